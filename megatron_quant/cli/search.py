"""The flags of a search for mixed precision, and the ``search`` verb that solves one again."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

import megatron_quant as mq
from megatron_quant.cli.collapse import collapse
from megatron_quant.cli.console import console, escape, size
from megatron_quant.cli.reporting import add_reporting

_COST_HELP = (
    "how bits are counted. weight: what is stored, scales included. active: what a token reads, so "
    "experts count by the share of them that it is sent to (default weight)"
)


def add_search(p: argparse.ArgumentParser) -> None:
    """Add the flags of ``quantize`` that search for a recipe."""
    group = p.add_argument_group("search for mixed precision")
    group.add_argument(
        "--auto-quantize-bits",
        type=float,
        metavar="B",
        help="find the recipe: the format of every place (what engines fuse, such as qkv or a "
        "layer's experts) that loses least with at most B bits a weight, scales included; instead "
        "of --export-quant-cfg",
    )
    group.add_argument(
        "--auto-quantize-formats",
        default="nvfp4,fp8",
        metavar="CFGS",
        help="candidates: recipes with commas between; leaving a place unquantized is always one "
        "(default nvfp4,fp8)",
    )
    group.add_argument(
        "--auto-quantize-method",
        choices=mq.choices().search_methods,
        default="gradient",
        help="gradient: one forward and backward a batch scores all candidates. kl_div: a forward "
        "a batch for every place and candidate; slower, but sees what the logits do (default "
        "gradient)",
    )
    group.add_argument(
        "--auto-quantize-score-size",
        type=int,
        default=128,
        metavar="N",
        help="samples of --calib-dataset to score on (default 128)",
    )
    group.add_argument(
        "--auto-quantize-checkpoint",
        type=Path,
        metavar="DIR",
        help="keep the scores here (with --stream also hidden states, until all is scored): a "
        "search that was stopped goes on, and "
        "'megatron-quant search DIR' chooses for other bits without a forward",
    )
    group.add_argument(
        "--auto-quantize-recipe",
        type=Path,
        metavar="FILE",
        help="write the found recipe here, as the YAML that --export-quant-cfg takes at any layout",
    )
    group.add_argument(
        "--auto-quantize-cost",
        choices=mq.choices().search_costs,
        default="weight",
        help=_COST_HELP,
    )
    group.add_argument(
        "--auto-quantize-context-length",
        type=int,
        metavar="TOKENS",
        help="with --auto-quantize-cost active: choose the format of the KV cache too, among those "
        "that the candidates' recipes name and none; a token then reads this many tokens' keys and "
        "values as well",
    )
    group.add_argument(
        "--auto-quantize-keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave modules as they are, such as '*.layers.0.*'; may be given again",
    )
    group.add_argument(
        "--auto-quantize-head",
        type=Path,
        metavar="FILE",
        help="with --stream: safetensors with the output layer of a checkpoint that has none "
        "(default: lm_head.safetensors beside it, or its embedding if config.json ties them)",
    )


def places_table(planned: "mq.PlannedSearch", verbose: bool = False) -> Table:
    """List the places of a search, and the treatments that each may have."""
    table = Table("Place", "Count", "Weights", "Formats", title="Places")
    kinds = collapse(
        planned.problem.places,
        lambda place: place.name,
        lambda place: (place.elements, place.options),
        layers=not verbose,
    )
    for name, members in kinds:
        formats = ", ".join(dict.fromkeys(o.action for o in members[0].options if o.changes))
        weights = sum(place.elements for place in members)
        table.add_row(escape(name), str(len(members)), str(weights), formats or "none")
    return table


def scoring_lines(planned: "mq.PlannedSearch", directory: Path | None) -> Iterator[str]:
    """Yield lines on what scoring takes, whose files lie in ``directory``."""
    memory, problem = planned.memory, planned.problem
    where = "a temporary folder" if directory is None else escape(str(directory))
    yield (
        f"scores: layer by layer, {size(memory.weights)} of weights at a time, each layer loaded "
        f"{memory.loads} times; hidden states of {planned.tokens} tokens take "
        f"{size(memory.states_per_token * planned.tokens)} of disk in {where}"
    )
    changes = sum(option.changes for place in problem.places for option in place.options)
    yield f"{len(problem.places)} places, {changes} formats at them in all"


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the top parser."""
    p = verbs.add_parser(
        "search",
        help="choose again among scored formats, for another number of bits",
        description="Solve a search again from the scores that quantize --auto-quantize-checkpoint "
        "kept: for other bits, another cost or fewer formats. Runs no forward.",
    )
    p.add_argument("directory", type=Path, metavar="DIR", help="the directory of scores")
    p.add_argument("--bits", type=float, required=True, metavar="B", help="most bits a weight")
    p.add_argument("--formats", metavar="CFGS", help="some of the candidates (default: all)")
    p.add_argument("--cost", choices=mq.choices().search_costs, default="weight", help=_COST_HELP)
    p.add_argument("--recipe", type=Path, metavar="FILE", help="write the found recipe here")
    add_reporting(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Solve and print."""
    found = mq.search_again(
        args.directory,
        args.bits,
        formats=args.formats,
        cost=args.cost,
        recipe=args.recipe,
        report=args.report,
        log_to=args.log_to,
    )
    table = Table("Place", "Format", "Score", title=escape(found.recipe.description))
    for place, action, score in found.rows:
        table.add_row(escape(place), action, f"{score:.4g}")
    console().print(table)
