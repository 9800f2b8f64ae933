"""Run a checkpoint under vLLM's own Python, and write the results as a JSON file.

    python serve.py DIR '[token ids]' OUT.json

The greedy continuation of the prompt, and the log-probabilities of the whole
vocabulary at every position of the prompt but the first.
"""

import json
import sys
from pathlib import Path

NEW_TOKENS = 8


def log_probs(output, vocab_size: int) -> list[list[float]]:
    return [[at[token].logprob for token in range(vocab_size)] for at in output.prompt_logprobs[1:]]


def started(directory: str):
    """vLLM with the checkpoint, and torch's product where its library has no INT4."""
    from int4_product import define_where_missing
    from vllm import LLM
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    define_where_missing()
    return LLM(
        directory,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        max_logprobs=_vocab_size(directory),
        skip_tokenizer_init=True,
        language_model_only=True,
        disable_log_stats=True,
    )


def generated(llm, prompt: list[int]) -> dict[str, list]:
    """The greedy continuation of ``prompt``, and the log-probabilities at its positions."""
    from vllm import SamplingParams

    vocab_size = llm.model_config.get_vocab_size()
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=vocab_size, detokenize=False
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    return {
        "tokens": list(output.outputs[0].token_ids),
        "log_probs": log_probs(output, vocab_size),
    }


def _vocab_size(directory: str) -> int:
    config = json.loads(Path(directory, "config.json").read_text())
    return config.get("text_config", config)["vocab_size"]


def main() -> None:
    directory, prompt = sys.argv[1], json.loads(sys.argv[2])
    Path(sys.argv[3]).write_text(json.dumps(generated(started(directory), prompt)))


if __name__ == "__main__":
    main()
