"""Prints the tables of docs/formats.md, or writes them there.

python docs/formats_table.py --write
"""

import argparse
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from megatron_quant.ckpt.dialects.base import Layer
from megatron_quant.ckpt.dialects.registry import DIALECTS
from megatron_quant.engines.facts import FACTS
from megatron_quant.errors import FormatError
from megatron_quant.formats import amax, decode, encode, tensor_scale
from megatron_quant.formats.spec import CHANNEL, Format
from megatron_quant.recipes.load import load_recipe, recipe_names
from megatron_quant.recipes.schema import Rule

PAGE = Path(__file__).parent / "formats.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
ROWS, COLS = 4096, 4096


def bits(fmt: Format) -> float:
    """Stored bits per element of a ROWS x COLS weight, scales included."""
    stored = sum(prod(f.shape(ROWS, COLS)) * f.dtype.itemsize * 8 for f in fmt.fields)
    return stored / (ROWS * COLS)


def error(fmt: Format) -> float:
    """Relative error of a seeded Gaussian weight in bf16, with max scales."""
    torch.manual_seed(0)
    w_NK = (torch.randn(512, COLS) * 0.02).to(torch.bfloat16)
    dscale = tensor_scale(amax(w_NK), fmt) if fmt.tensor_scale else None
    decoded = decode(encode(w_NK, fmt, dscale), fmt, torch.float32)
    return float((decoded - w_NK.float()).norm() / w_NK.float().norm())


def described(fmt: Format | None) -> str:
    if fmt is None:
        return "-"
    if fmt.group_size in (0, CHANNEL):
        return fmt.name
    return f"{fmt.name} ({fmt.group_size})"


def stores(dialect: str, rule: Rule) -> str:
    """Whether a dialect stores the rule's formats: everywhere, or in dense layers alone."""
    assert rule.weights is not None
    found = []
    for layer in Layer:
        try:
            DIALECTS[dialect].stored(rule.weights, rule.inputs, layer)
            found.append(layer)
        except FormatError:
            continue
    if len(found) == len(Layer):
        return "yes"
    return f"{found[0].value} only" if found else "-"


def recipes_table() -> Iterator[str]:
    header = ["recipe", "weights", "inputs", "bits a weight", "error", *DIALECTS]
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for name in recipe_names():
        for rule in load_recipe(name).rules:
            if rule.weights is None:
                continue
            cells = [f"`{name}`", described(rule.weights), described(rule.inputs)]
            cells += [f"{bits(rule.weights):.3f}", f"{error(rule.weights):.4f}"]
            yield "| " + " | ".join([*cells, *(stores(d, rule) for d in DIALECTS)]) + " |"


def facts_table() -> Iterator[str]:
    yield "| engine | dialect | weights | where | why not | instead |"
    yield "|---|---|---|---|---|---|"
    for fact in FACTS:
        cells = (", ".join(fact.engines), fact.dialect, ", ".join(fact.weights), fact.where)
        yield "| " + " | ".join((*cells, fact.reason, fact.instead)) + " |"


def tables() -> str:
    return "\n".join(
        [
            "## What each recipe stores, and where",
            "",
            f"Bits of a {ROWS} x {COLS} weight with its scales; relative error of a Gaussian",
            "weight with max scales; whether the dialect stores it.",
            "",
            *recipes_table(),
            "",
            "## What engines are known to reject or to misread",
            "",
            *facts_table(),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/formats.md")
    if not parser.parse_args().write:
        print(tables())
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
