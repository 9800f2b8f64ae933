"""The tokenizer that lies beside a checkpoint's weights."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_quant.errors import CheckpointError


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of a checkpoint: local files alone, no remote code.

    Raises CheckpointError where transformers cannot read one, or reads an empty one.
    """
    refused = CheckpointError(
        f"{directory}: no tokenizer that transformers can read; put the original model's there"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as e:  # of a broken file transformers raises whatever its parser does
        raise refused from e
    # Where the files are missing transformers may hand out a tokenizer with an empty vocabulary.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise refused
    return tokenizer
