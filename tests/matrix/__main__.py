"""Run the layer, calibration and export tests against other versions of the libraries.

    python -m tests.matrix                 # every row; the compiled one where its wheel is cached
    python -m tests.matrix oldest newest
    python -m tests.matrix --write         # and put the table into docs/versions.md

Ends with 0 where every row passed; rows that could not run on this host are named at the end. A
Python that the host lacks is no failure; an environment that could not be made is one, unless
``--missing report`` says otherwise.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from tests.matrix.install import (
    ROOT,
    Installer,
    NoPythonError,
    NotInstalledError,
    cache,
    installed,
)
from tests.matrix.rows import ROWS, TESTS, Row

PAGE = "docs/versions.md"
MARKERS = ("<!-- versions: make test-matrix -->", "<!-- /versions -->")
PASSED, FAILED, NO_PYTHON, NOT_INSTALLED = "passed", "failed", "no python", "not installed"


@dataclass(frozen=True)
class Result:
    """What became of a row: ``state`` is one of the four above, ``text`` says it in words."""

    row: Row
    state: str
    text: str
    torch: str = ""


def main() -> int:
    arguments = parse()
    installer = Installer(arguments.install_limit)
    results = [run(row, installer) for row in chosen(arguments.rows)]
    print("\n" + table(results))
    for result in results:
        if result.state in (NO_PYTHON, NOT_INSTALLED):
            print(f"NOT RUN: {result.row.name}: {result.text}")
    bad = {FAILED} | ({NOT_INSTALLED} if arguments.missing == "fail" else set())
    if arguments.write:
        write(results)
    return int(any(result.state in bad for result in results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("rows", nargs="*", choices=[[], *(row.name for row in ROWS)])
    parser.add_argument("--write", action="store_true", help="put the table into docs/versions.md")
    parser.add_argument("--install-limit", type=float, default=3600, help="seconds, all rows")
    parser.add_argument("--missing", choices=["fail", "report"], default="fail")
    return parser.parse_args()


def chosen(names: list[str]) -> list[Row]:
    if names:
        return [row for row in ROWS if row.name in names]
    wheel = any((cache() / "wheels").glob("transformer_engine_torch*.whl"))
    return [row for row in ROWS if wheel or not row.compiled]


def run(row: Row, installer: Installer) -> Result:
    print(f"== {row.name}: Python {row.python}, {row.versions}", flush=True)
    try:
        python, folders = installer.environment(row)
    except NoPythonError as e:
        return Result(row, NO_PYTHON, str(e))
    except NotInstalledError as e:
        return Result(row, NOT_INSTALLED, str(e))
    torch = installed(python, folders, ["torch"])["torch"].split("+")[0]
    return Result(row, *tested(row, python, folders), torch)


def tested(row: Row, python: Path, folders: list[Path]) -> tuple[str, str]:
    """The state and the counts of the tests in the row's environment."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *folders])),
        "CUDA_VISIBLE_DEVICES": "",
    }
    if row.compiled:
        environment["NVTE_PLUGIN"] = "megatron_quant.cpu.plugin"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
        command += [f"--deselect={test}" for test in row.without]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if not report.exists():
            return FAILED, f"pytest ended with {code}"
        suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    passed = int(suite.get("tests", 0)) - bad - skipped
    if code or bad or not passed:
        return FAILED, f"{bad} failed, {passed} passed"
    return PASSED, f"{passed} passed"


HEAD = (
    "| Python | torch | Transformer Engine | Megatron-Core | ModelOpt | transformers | tests |",
    "|---|---|---|---|---|---|---|",
)


def table(results: list[Result]) -> str:
    return "\n".join([*HEAD, *(line(result) for result in results)])


def line(result: Result) -> str:
    row = result.row
    te = f"{row.te}, compiled" if row.compiled else row.te
    text = result.text if result.state in (PASSED, FAILED) else "not run"
    cells = (row.python, result.torch or "-", te, row.core, row.modelopt, row.transformers, text)
    return f"| {' | '.join(cells)} |"


def key(text: str) -> tuple[str, ...]:
    """What tells a line of the table from the others: all versions but torch's."""
    python, _, *versions, _ = text.strip("| ").split(" | ")
    return (python, *versions)


def write(results: list[Result]) -> None:
    """Put the lines into the page; lines of rows that were not asked for stay as they are."""
    if any(result.state != PASSED for result in results):
        sys.exit(f"{PAGE} stays as it is: not every row passed")
    path = ROOT / PAGE
    before, rest = path.read_text(encoding="utf-8").split(MARKERS[0])
    now, after = rest.split(MARKERS[1])
    lines = {key(text): text for text in now.strip().splitlines()[len(HEAD) :]}
    lines |= {key(line(result)): line(result) for result in results}
    order = [key(line(Result(row, PASSED, "-"))) for row in ROWS]
    body = "\n".join([*HEAD, *(lines[k] for k in order if k in lines)])
    path.write_text(f"{before}{MARKERS[0]}\n{body}\n{MARKERS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
