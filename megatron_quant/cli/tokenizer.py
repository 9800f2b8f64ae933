"""Flags that say which tokenizer reads texts."""

import argparse
from pathlib import Path


def add_tokenizer(group: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add ``--tokenizer`` and ``--trust-remote-code``."""
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="folder of the tokenizer that reads the text (default: the checkpoint's own)",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code of a tokenizer that is code, such as Kimi-K2's; the model's code "
        "is never run",
    )
