"""Time work in turns, and write the results as Markdown."""

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Row = list[str]
Work = Callable[[], object]
_END = "<!-- end -->"


def seconds(work: Sequence[Work | None], rounds: int) -> list[float | None]:
    """Return each work's least CPU seconds, measured in turns; the first turn does not count."""
    taken: list[list[float]] = [[] for _ in work]
    for turn in range(rounds + 1):
        for times, run in zip(taken, work, strict=True):
            if run is None:
                continue
            start = time.thread_time()
            run()
            if turn:
                times.append(time.thread_time() - start)
    return [min(times) if times else None for times in taken]


def host() -> str:
    """Describe the CPU in general terms."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    widest = "AVX-512" if " avx512vl" in text else "AVX2" if " avx2" in text else "baseline"
    return f"{names[0] if names else platform.machine()}, {widest}"


def table(title: str, header: str, rows: list[Row]) -> str:
    """Make a Markdown table under a line of text; ``|`` separates the columns of ``header``."""
    lines = [header.split("|"), ["---", *["---:"] * header.count("|")], *rows]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_measured(path: Path, measured: str, what: str = "measured") -> None:
    """Put ``measured`` between the two marks of a file: ``<!-- what -->`` and the next end."""
    before, mark, rest = path.read_text(encoding="utf-8").partition(f"<!-- {what} -->")
    _, end, after = rest.partition(_END)
    assert end, f"{path} has no <!-- {what} --> ... {_END}"
    path.write_text(f"{before}{mark}\n{measured}\n{end}{after}", encoding="utf-8")
