"""One export by llm-compressor, run by accuracy.py and gptq_cost.py with the Python that has it.

    python accuracy_llm_compressor.py SCHEME RTN|GPTQ MODEL TEXT OUT SAMPLES

prints a line of JSON: CPU seconds, and the memory in MB of the imports and above them. Samples
are 512 tokens of the text, in its order, as ours are. Routers and the output head stay as they are.
"""

import json
import sys
import time
from pathlib import Path

import datasets
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

_SEQUENCE = 512
_STATIC_INPUTS = "NVFP4"
"""The scheme whose inputs have scales that data gives."""
_IGNORED = ["lm_head", "re:.*mlp.gate$"]


def _peak() -> float:
    """Return the most memory that this process has held, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Quantize and save."""
    scheme, how, path, text, out, samples = sys.argv[1:]
    imports = _peak()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with open(text, encoding="utf-8") as file:
        ids = tokenizer(file.read(), add_special_tokens=False)["input_ids"]
    cut = [ids[i : i + _SEQUENCE] for i in range(0, len(ids) - _SEQUENCE, _SEQUENCE)][
        : int(samples)
    ]
    data = datasets.Dataset.from_list(
        [{"input_ids": c, "attention_mask": [1] * len(c)} for c in cut]
    )
    kind = GPTQModifier if how == "GPTQ" else QuantizationModifier
    recipe = kind(targets="Linear", scheme=scheme, ignore=_IGNORED)
    before = time.process_time()
    if how == "GPTQ" or scheme == _STATIC_INPUTS:
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            max_seq_length=_SEQUENCE,
            num_calibration_samples=len(cut),
        )
    else:
        oneshot(model=model, recipe=recipe)
    taken = time.process_time() - before
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    print(json.dumps({"seconds": taken, "peak": _peak() - imports, "imports": imports}))


if __name__ == "__main__":
    main()
