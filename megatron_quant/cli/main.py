"""``megatron-quant VERB``: parse, call, print."""

import argparse
import sys
import warnings
from collections.abc import Sequence

from megatron_quant.cli import evaluate, export, quantize, verify
from megatron_quant.cli.console import print_error
from megatron_quant.errors import QuantError

_DESCRIPTION = """\
Quantize Megatron-Core / Transformer Engine models, mixture-of-experts first.

  quantize   a Hugging Face checkpoint in, a serving-ready quantized checkpoint out
  export     a quantized checkpoint in another engine's format, bit for bit
  verify     prove that a checkpoint is complete and what its own config says
  eval       perplexity on a text, and KL divergence from the original
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    top = argparse.ArgumentParser(
        prog="megatron-quant",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for module in (quantize, export, verify, evaluate):
        module.add_parser(verbs)
    return top


def run(args: argparse.Namespace) -> int:
    """Call the verb; its exit status. An error that the user can act on becomes one line."""
    try:
        args.run(args)
    except QuantError as error:
        print_error(error)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what other libraries warn of; python -W shows it
    return run(parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
