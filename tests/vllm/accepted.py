"""Exports of every family, and what vLLM's own classes make of their tensors."""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_quant.engines.serving import obstacle
from megatron_quant.errors import FormatError
from tests.dist import checkpoints
from tests.unit import family_models, sources
from tests.unit.family_models import FAMILIES, PARTIAL
from tests.vllm.engine import finish, start

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
BEGIN, END = "<!-- vllm: begin -->", "<!-- vllm: end -->"
GROUP_32 = """\
description: INT4 experts in groups of 32, which tiny ones take.
rules:
  - quantize: ["*.experts.*"]
    weights: {format: int4, group_size: 32}
  - exclude: ["*"]
"""


@dataclass(frozen=True)
class Kind:
    """An export of a family: its title in the table, options, and whether inputs are quantized."""

    title: str
    options: Mapping[str, Any]
    inputs: bool = False


KINDS = (
    Kind(
        "FP8, compressed-tensors",
        {
            "export_quant_cfg": "fp8_channel",
            "export_format": "compressed-tensors",
            "weight_only": False,
        },
        inputs=True,
    ),
    Kind("NVFP4, ModelOpt", {"export_quant_cfg": "w4a16_nvfp4", "export_format": "modelopt"}),
    Kind(
        "INT4 experts, compressed-tensors",
        {"export_quant_cfg": GROUP_32, "export_format": "compressed-tensors"},
    ),
)
TABLED = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3")
"""Models with a table, beside the families: those of tests/dist/checkpoints.py."""
HUB = {"deepseek_v3": {"topk_method": "noaux_tc"}}
"""Keys of config.json that the hub has, and transformers does not save."""
NAMES = (*TABLED, *FAMILIES)
DROPPED = r"mtp"
"""Names with this are layers for speculation, which a class leaves to another one."""


NOT_BUILT = {
    "ModuleNotFoundError: No module named 'cutlass'": "not built on a CPU",
    "Model architectures": "no such class",
}
"""Words of an error, and those of the table."""
STACKS = Kind("MXFP4 stacks", {"export_quant_cfg": "gpt_oss", "export_format": "mxfp4"})
"""gpt-oss, whose experts engines load as stacks alone."""


def exported(work: Path, names: Sequence[str] = NAMES) -> dict[str, Path | str]:
    """By ``family/kind``: the directory of an export, or why there is none."""
    found: dict[str, Path | str] = {}
    for name in names:
        saved = checkpoints if name in TABLED else family_models
        source = saved.save(name, work / name / "source")
        sources.config(source, **HUB.get(name, {}))
        for kind in (*KINDS, STACKS) if name == "gpt_oss" else KINDS:
            found[f"{name}/{kind.title}"] = export_of(source, work / name / kind.title, kind)
    return found


def export_of(source: Path, out: Path, kind: Kind) -> Path | str:
    """Return the directory of an export, or why there is none for vLLM."""
    options = dict(kind.options)
    if "\n" in options["export_quant_cfg"]:
        recipe = out.parent / "recipe.yaml"
        recipe.write_text(options["export_quant_cfg"])
        options["export_quant_cfg"] = str(recipe)
    try:
        job = sources.run(source, out, **options).job
    except FormatError as e:
        return f"not written: {e}"
    assert job.dialect is not None
    name = job.dialect.name
    refused = obstacle(job.quant, job.params, name, "vllm", None, job.hf_config)
    return out if refused is None else f"refused: {refused.what}"


def loaded(directories: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What load.py finds of these, in one process."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work, "found.json")
        finish(start("load.py", out, *(f"{n}={path}" for n, path in directories.items())))
        return json.loads(out.read_text())


def wrong(name: str, kind: Kind, found: Mapping[str, Any]) -> list[str]:
    """What a class did that it should not, in words; nothing if it takes every tensor."""
    if "error" in found:
        return [found["error"]]
    towers = PARTIAL.get(name, ())
    missing = [p for p in found["missing"] if not p.startswith(towers)]
    if not kind.inputs:  # a weight-only method makes a parameter of it, and drops it
        missing = [p for p in missing if not p.endswith("input_scale")]
    untaken = [n for n in found["untaken"] if DROPPED not in n]
    return [
        *(f"{p} is not filled" for p in missing),
        *(f"{n} is skipped" for n in untaken),
        *found["cast"],
    ]


def written(exports: Mapping[str, Path | str]) -> dict[str, Path]:
    """Those that are there."""
    return {key: found for key, found in exports.items() if isinstance(found, Path)}


def page(exports: Mapping[str, Path | str], found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what docs/architectures.md says of these: the table, and why a cell is no yes."""
    return "\n".join([*_table(exports, found), "", *_reasons(exports)])


def _table(
    exports: Mapping[str, Path | str], found: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    yield f"| `model_type` | vLLM's class | {' | '.join(kind.title for kind in KINDS)} |"
    yield f"|---|---|{'---|' * len(KINDS)}"
    for name in NAMES:
        keys = [f"{name}/{kind.title}" for kind in KINDS]
        classes = {found[key]["class"] for key in keys if "class" in found.get(key, {})}
        cells = [
            _cell(name, kind, exports[key], found.get(key))
            for key, kind in zip(keys, KINDS, strict=True)
        ]
        yield f"| `{name}` | {_code(classes)} | {' | '.join(cells)} |"


def _cell(name: str, kind: Kind, there: Path | str, found: Mapping[str, Any] | None) -> str:
    if isinstance(there, str):
        return there.partition(":")[0]
    assert found is not None
    problems = wrong(name, kind, found)
    if not problems:
        return "yes"
    known = (words for said, words in NOT_BUILT.items() if said in problems[0])
    return next(known, f"no: {problems[0]}")


def _code(classes: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(classes)) or "-"


def _reasons(exports: Mapping[str, Path | str]) -> Iterator[str]:
    lines = dict[str, list[str]]()
    for key, found in exports.items():
        if isinstance(found, str):
            name, _, kind = key.partition("/")
            lines.setdefault(f"`{name}`: {found.partition(': ')[2]}", []).append(kind)
    for line, kinds in lines.items():
        yield f"* {line} ({'; '.join(kinds)})."


def main() -> None:
    """Print the page's part, or write it there: python -m tests.vllm.accepted --write."""
    with tempfile.TemporaryDirectory() as work:
        exports = exported(Path(work))
        said = page(exports, loaded(written(exports)))
    if "--write" not in sys.argv:
        print(said)
        return
    put(said, PAGE, BEGIN, END)


def put(said: str, page: Path, begin: str, end: str) -> None:
    """Write a part of a page, between two marks."""
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n\n{said}\n\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main()
