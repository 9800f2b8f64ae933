"""Flags that say where a verb's facts go."""

import argparse
from pathlib import Path


def add_reporting(group: "argparse._ActionsContainer") -> None:
    """Add ``--report`` and ``--log-to``."""
    group.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="draw the findings as one page (.html), with the same facts beside it as .json; with "
        "another ending, write the facts alone, as JSON",
    )
    group.add_argument(
        "--log-to",
        metavar="TRACKER",
        help="log the same facts to mlflow, mlflow:URI, tensorboard (into runs/) or "
        "tensorboard:DIR, as parameters, metrics and, for mlflow, the page",
    )
