"""Flags that say how an export is written, shared by the verbs that write one."""

import argparse


def add_writing(group: "argparse._ActionsContainer") -> None:
    """Add ``--max-shard-size``, ``--resume`` and the flags between them."""
    group.add_argument(
        "--max-shard-size", default="5GB", help="largest safetensors file (default 5GB)"
    )
    group.add_argument(
        "--io-threads",
        type=int,
        default=2,
        metavar="N",
        help="threads per rank that hash and write while it encodes (default 2)",
    )
    group.add_argument(
        "--fsync",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put everything on stable storage before the index appears, so that a power cut "
        "leaves a whole checkpoint or none (default); --no-fsync leaves that to the system: a "
        "killed run can still be resumed, a power cut may damage files. Megatron itself always "
        "syncs what --megatron-save-path writes",
    )
    group.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the export back before its files get their names; each rank reads a share "
        "(default). --no-verify leaves that to the verb verify",
    )
    group.add_argument(
        "--verbose",
        action="store_true",
        help="list every layer and file in the tables (default: layers that are alike share a row)",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that is there"
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue what a killed run left in --export-dir, or start if there is nothing; what "
        "is intact is not written again. Refused if the recipe, source, files or calibrated scales "
        "differ. A run that fails with this flag (a full disk) keeps what it wrote; without it, "
        "that is removed",
    )
