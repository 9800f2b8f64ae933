"""``megatron-quant VERB``: parse, call, print."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from megatron_quant import __version__
from megatron_quant.cli import evaluate, export, quantize, search, sensitivity, verify
from megatron_quant.cli.failure import TRACEBACK, fail
from megatron_quant.errors import QuantError, RankError
from megatron_quant.faults import MINUTES

_DESCRIPTION = "Quantize Megatron-Core / Transformer Engine models, mixture-of-experts first."
_EXAMPLES = """\
examples:
  megatron-quant quantize --stream --hf-model-id PATH --export-quant-cfg int4 --export-dir OUT
  megatron-quant verify OUT --against PATH
  megatron-quant eval OUT --text heldout.txt --against PATH

megatron-quant VERB --help shows the flags of a verb. On several ranks, torchrun starts the same
words: torchrun --nproc-per-node 4 examples/quantize.py --hf-model-id PATH ...
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    top = argparse.ArgumentParser(
        prog="megatron-quant",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"megatron-quant {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    for module in (quantize, export, verify, evaluate, search, sensitivity):
        module.add_parser(verbs)
    for verb in verbs.choices.values():
        _running_flags(verb)
    return top


def _running_flags(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("running")
    group.add_argument(
        "--distributed-timeout-minutes",
        type=float,
        default=MINUTES,
        metavar="M",
        help="under torchrun: how long a rank waits for the slowest one, which may be reading, "
        f"downloading or writing, before it gives up (default {MINUTES:g})",
    )
    group.add_argument(
        "--traceback",
        action="store_true",
        help=f"show where an error comes from; so does {TRACEBACK}=1",
    )


def run(args: argparse.Namespace) -> int:
    """Call the verb and return its exit status. A user's error becomes one line."""
    try:
        if not args.distributed_timeout_minutes > 0:
            minutes = args.distributed_timeout_minutes
            raise QuantError(f"--distributed-timeout-minutes is {minutes:g}: give more than 0")
        if _is_one_of_many():
            _check_started_alike(args)
        args.run(args)
    except (Exception, KeyboardInterrupt) as error:
        return fail(error, args.traceback)
    return 0


def _is_one_of_many() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _check_started_alike(args: argparse.Namespace) -> None:
    # Only here: torch takes seconds to import.
    from megatron_quant.rendezvous import check_started_alike

    check_started_alike(_started(args), args.distributed_timeout_minutes)


def _started(args: argparse.Namespace) -> dict[str, str]:
    """Return the settings that must agree on all ranks, by readable names."""
    import torch

    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()}
    del flags["--run"]
    return {
        "the command line": "well",
        "the version of megatron_quant": __version__,
        "the version of torch": torch.__version__,
        "whether there is a GPU": str(torch.cuda.is_available()),
        "the verb": str(flags.pop("--verb")),
        **{name: str(value) for name, value in flags.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # from other libraries; python -W shows them
    try:
        args = parser().parse_args(argv)
    except SystemExit:
        _tell_the_others()
        raise
    return run(args)


def _tell_the_others() -> None:
    """Tell the other ranks that this one stops: its flags were refused, or ask for help."""
    if not _is_one_of_many():
        return
    from megatron_quant.rendezvous import check_started_alike

    try:
        check_started_alike({"the command line": "none that runs"})
    except RankError as error:
        fail(error)


if __name__ == "__main__":
    sys.exit(main())
