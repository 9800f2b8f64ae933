"""Measure found recipes against uniform ones: the table of docs/auto_quantize.md.

    python docs/auto_quantize_table.py CHECKPOINT CALIBRATION_TEXT HELDOUT_TEXT WORK_DIR

It prints, for each recipe, the bits that its weights have on disk and the mean KL divergence from
the checkpoint on the held-out text.
"""

import sys
from math import prod
from pathlib import Path

import megatron_quant as mq
from megatron_quant.models import Role

BY_HAND = ("nvfp4", "fp8_attention_nvfp4_mlp", "nvfp4_experts_only", "nvfp4_mlp_only", "fp8")
BITS = (4.51, 5.0, 6.0)
SAMPLES = 32


def bits(job: mq.Job) -> float:
    """Bits a weight of all linears, scales included."""
    linears = [t for t in job.exported.targets if t.param.role is Role.LINEAR]
    stored = sum(entry.nbytes for t in linears for entry in t.entries)
    return 8 * stored / sum(prod(t.source.shape) for t in linears)


def main() -> None:
    source, text, heldout, work = map(Path, sys.argv[1:])
    data = mq.Calibration(dataset=str(text), size=32, cold_experts="layer-max")
    write = mq.Write(overwrite=True, fsync=False)

    def row(name: str, recipe: str | None, auto: mq.AutoQuantize) -> None:
        out = work / "out"
        job = mq.stream(source, recipe, out, calibration=data, write=write, auto=auto).job
        divergence = mq.evaluate(out, heldout, against=source, max_tokens=8192).kl
        print(f"| {name} | {bits(job):.3f} | {divergence:.5f} |", flush=True)

    for name in BY_HAND:
        row(f"`{name}`", name, mq.AutoQuantize())
    for method in ("gradient", "kl_div"):
        scores = work / f"scores-{method}"
        for most in BITS:
            auto = mq.AutoQuantize(bits=most, method=method, score_size=SAMPLES, checkpoint=scores)
            row(f"found by {method}, at most {most:g} bits", None, auto)


if __name__ == "__main__":
    main()
