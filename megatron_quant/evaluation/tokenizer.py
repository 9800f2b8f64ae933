"""The tokenizer that lies beside a checkpoint's weights."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_quant.documents import MB, Limits, check_file
from megatron_quant.errors import CheckpointError

_PARSED = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_INDEX = ".index.json"
_LARGEST = Limits(128 * MB, 0)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of a checkpoint: local files alone, no remote code.

    Raises CheckpointError where transformers cannot read one, or reads an empty one, and for a
    file of it that is no regular one, or larger than any tokenizer's.
    """
    for path in directory.glob("*"):
        if path.suffix in _PARSED and not path.name.endswith(_INDEX) and not path.is_dir():
            check_file(path, _LARGEST)
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
