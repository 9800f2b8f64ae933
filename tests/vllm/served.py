"""Families in vLLM, up to the product of codes: are its log-probabilities the decoded model's?

The tiny models have sizes that vLLM's kernels for a CPU take. Where it has no kernel at all, the
cell says so.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers as t

from megatron_quant.errors import CheckpointError
from tests.dist import checkpoints
from tests.unit import family_models
from tests.unit.family_models import FAMILIES, Tiny
from tests.vllm.accepted import KINDS, PAGE, TABLED, export_of, put
from tests.vllm.engine import PROMPT, answer, error, finish, start

ROUNDING = 0.03
"""Largest relative distance of log-probabilities. Products in bf16 leave 0.5 %, and up to 2 % at
single tokens."""
_, NVFP4, INT4 = KINDS
IN_INT4 = ("mixtral", "minimax_m3_vl_text", "afmoe")
"""Families whose export in NVFP4 vLLM does not load, and one for INT4's sake."""

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""Attention takes heads of 32. The projections keep their shapes."""
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
"""Latent attention takes these sizes alone."""
CONFIG = {
    "head_dim": 32,
    "swa_head_dim": 32,
    "swa_v_head_dim": 32,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
}
"""The same where only the hub's config.json says it."""
OTHERS: dict[str, Mapping[str, object]] = {
    "qwen3_vl_moe": HEADS
    | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 6, 6],
            "mrope_interleaved": True,
        }
    },
    **dict.fromkeys(("glm4_moe_lite", "kimi_k25"), LATENT),
    "longcat_flash": LATENT | {"head_dim": 64, "qk_head_dim": 80},
    "step3p5": {"head_dim": 32},
    "mimo_v2_flash": HEADS | {"v_head_dim": 32},
    **dict.fromkeys(
        ("qwen3_5_moe", "qwen3_next"),
        HEADS | {"linear_key_head_dim": 32, "linear_value_head_dim": 32},
    ),
}
NORMS = {
    "step3p5": {
        f"model.layers.{i}.self_attn.{n}.weight": shape
        for i in range(2)
        for n, shape in (("q_norm", (32,)), ("k_norm", (32,)))
    },
    "bailing_moe_v2": {
        f"model.layers.{i}.attention.{n}_layernorm.weight": (32,)
        for i in range(2)
        for n in ("query", "key")
    },
}
"""Shapes of norms in models that transformers does not build."""


def tiny(name: str) -> Tiny:
    """Return the family's tiny model in other sizes."""
    known = FAMILIES[name]

    def make() -> t.PreTrainedModel:
        model = known.make()
        config = model.config
        for key, value in OTHERS.get(name, HEADS).items():
            setattr(config.get_text_config(), key, value)
        return type(model)(config)

    config = known.config | {k: v for k, v in CONFIG.items() if k in known.config}
    return replace(known, make=make, config=config, added={**known.added, **NORMS.get(name, {})})


NOT_RUN = {
    "Sparse Attention is not supported": "a CPU has no sparse attention",
    'assert self.scoring_func == "softmax"': "a CPU has no router of this kind",
    "has no attribute 'topk_softmax'": "a CPU has no router of this kind",
    "No Unquantized MoE backend": "a CPU has no experts without a gate",
    "head dim size": "a CPU's delta nets take no heads of this size",
}
"""Words of an error, and those of the table."""


SERVED = ("qwen3_moe", "mixtral", *FAMILIES)
BEGIN, END = "<!-- served: begin -->", "<!-- served: end -->"


def compared(work: Path, names: tuple[str, ...] = SERVED) -> dict[str, str]:
    """Say of each model what came of serving it; two run at a time."""
    exports = {name: exported(work / name, name) for name in names}
    there = [found for found in exports.values() if isinstance(found, Path)]
    for pair in (there[i : i + 2] for i in range(0, len(there), 2)):
        for process in [_start(directory) for directory in pair]:
            finish(process)
    return {
        name: _said(found) if isinstance(found, Path) else found.partition(":")[0]
        for name, found in exports.items()
    }


def exported(work: Path, name: str) -> Path | str:
    """Return the directory of an export of the model, or why there is none for vLLM."""
    if name in TABLED:
        source = checkpoints.save(name, work / "source")
    else:
        source = family_models.save(tiny(name), work / "source")
    return export_of(source, work / "out", INT4 if name in IN_INT4 else NVFP4)


def _start(directory: Path) -> subprocess.Popen[str]:
    return start("serve_plain.py", directory, json.dumps(PROMPT), directory.with_suffix(".json"))


def _found(directory: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = json.loads(directory.with_suffix(".json").read_text())
    return found


def _said(directory: Path) -> str:
    found = _found(directory)
    if "error" in found:
        known = (words for of, words in NOT_RUN.items() if of in found["error"])
        return next(known, f"not run ({str(found['error']).partition(':')[0]})")
    try:
        apart = error(answer(found)[1], directory)
    except CheckpointError:
        return "not compared, since transformers has no class"
    return "equal" if apart < ROUNDING else "apart, which is not explained yet"


def page(said: Mapping[str, str]) -> str:
    """Return what docs/architectures.md says of these: models by what came of them."""
    by_words: dict[str, list[str]] = {}
    for name, words in said.items():
        by_words.setdefault(words, []).append(f"`{name}`")
    rows = [f"| {words} | {', '.join(names)} |" for words, names in by_words.items()]
    return "\n".join(["| log-probabilities | `model_type` |", "|---|---|", *rows])


def main() -> None:
    """Print the page's part, or write it there: python -m tests.vllm.served --write."""
    with tempfile.TemporaryDirectory() as work:
        said = page(compared(Path(work)))
    if "--write" not in sys.argv:
        print(said)
        return
    put(said, PAGE, BEGIN, END)


if __name__ == "__main__":
    main()
