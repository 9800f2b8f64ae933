"""Flags that choose the tokenizer."""

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
        help="run the Python code that a tokenizer such as Kimi-K2's brings along; the model's "
        "code is never run",
    )
