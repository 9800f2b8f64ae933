"""Exports in one process that has ``errno_shim.c`` preloaded, as ``test_errno.py`` starts it.

``python -m tests.unit.errno_runs SOURCE FOLDER`` writes FOLDER/found.json: what became of each run,
and how many calls a run makes that nothing disturbs.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_quant.ckpt.write.directory import Existing
from megatron_quant.errors import QuantError
from tests.unit import sources, test_target
from tests.unit.errno_calls import CALLS, arm, disarm, seen
from tests.unit.errno_saves import fail_saves
from tests.unit.test_ckpt_writer import contents

STREAMED = 5
"""Numbers of a kind at which a stream fails; a small export fails at each."""
Write = Callable[[Path, bool], object]


@dataclass(frozen=True)
class Failed:
    """One run, and the one that followed it with ``--resume``.

    told: the error; empty for a run that could do without the call. left: names in its
    directory; None where that is gone.
    whole, resumed: whether it, and the run after it, left the bytes of one that nothing disturbs.
    """

    of: str
    call: str
    number: int
    resume: bool
    told: str
    left: list[str] | None
    whole: bool
    resumed: bool


def small(out: Path, resume: bool) -> None:
    test_target.write(out, Existing.RESUME if resume else Existing.REFUSE)


def streamed(source: Path) -> Write:
    return lambda out, resume: sources.run(
        source, out, resume=resume, export_quant_cfg="int8_group", max_shard_size="100KB"
    )


def numbers(count: int, of: str) -> list[int]:
    """Numbers of the calls that fail, from 1 on, the first and the last among them."""
    if of == "small" or count <= STREAMED:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (STREAMED - 1)) for i in range(STREAMED)})


def failed(of: str, write: Write, call: str, number: int, out: Path) -> Failed:
    whole = contents(out.with_name(of))
    resume, told = number % 2 == 0, ""
    arm(out, call, number)
    try:
        write(out, resume)
    except QuantError as error:
        told = str(error)
    disarm()
    left = contents(out) if out.exists() else None
    write(out, True)
    again = contents(out)
    shutil.rmtree(out)
    return Failed(
        of,
        call,
        number,
        resume,
        told,
        sorted(left) if left is not None else None,
        left == whole,
        again == whole,
    )


def main(source: Path, folder: Path) -> None:
    counts: dict[str, dict[str, int]] = {}
    found: list[Failed] = []
    for of, write in {"small": small, "streamed": streamed(source)}.items():
        write(folder / of, False)
        for call in CALLS:
            out = folder / f"{of}-{call}"
            arm(out, call)
            write(out, False)
            count = counts.setdefault(of, {})[call] = seen()
            shutil.rmtree(out)
            found += [failed(of, write, call, number, out) for number in numbers(count, of)]
    out = folder / "unsynced"
    arm(out, "fsync")
    test_target.write(out, fsync=False)
    counts["unsynced"] = {"fsync": seen()}
    saves = [asdict(run) for run in fail_saves(folder, source)]
    content = {"counts": counts, "runs": [asdict(run) for run in found], "saves": saves}
    (folder / "found.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
