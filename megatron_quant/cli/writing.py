"""Flags that say how an export is written, shared by the verbs that write one."""

import argparse


def add_writing(group: "argparse._ActionsContainer") -> None:
    """Add the flags from ``--max-shard-size`` to ``--resume``."""
    group.add_argument(
        "--max-shard-size", default="5GB", help="of one safetensors file (default 5GB)"
    )
    group.add_argument(
        "--io-threads",
        type=int,
        default=2,
        metavar="N",
        help="threads of each rank that hash and write while it encodes (default 2)",
    )
    group.add_argument(
        "--fsync",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="have all on stable storage before the index appears, so that a power cut leaves a "
        "whole checkpoint or none (default); --no-fsync leaves that to the system, and a killed "
        "run can still be resumed",
    )
    group.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the export back, the ranks a share each, before its files have their names "
        "(default); --no-verify leaves that to the verb verify",
    )
    group.add_argument(
        "--verbose",
        action="store_true",
        help="tables with every layer and file (default: like layers share a row)",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that is there"
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue what a killed run left in --export-dir, or start where there is nothing: "
        "what is there and intact is not written again. Refused where recipe, source, files or "
        "calibrated scales are others. A run that fails with this flag (a full disk) keeps what "
        "it wrote; without it, it removes that",
    )
