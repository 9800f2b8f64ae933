"""The version matrix's runner: its report of rows that did not pass or did not run."""

import sys
from pathlib import Path

import pytest

from tests.matrix import __main__ as matrix
from tests.matrix import install
from tests.matrix.rows import ROWS, TESTS, Row

OLDEST, NEWEST = ROWS[0], next(row for row in ROWS if row.name == "newest")


def passed(row: Row, text: str = "3 passed") -> matrix.Result:
    return matrix.Result(row, matrix.PASSED, text, "2.13.0")


def test_the_tests_of_the_rows_exist() -> None:
    assert [t for t in TESTS if not (install.ROOT / t.split("::")[0]).is_file()] == []


def test_only_the_lines_of_the_rows_that_ran_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    page = tmp_path / matrix.PAGE
    page.parent.mkdir()
    page.write_text(f"before\n{matrix.MARKERS[0]}\n{matrix.MARKERS[1]}\nafter\n")
    matrix.write([passed(NEWEST)])
    matrix.write([passed(OLDEST)])
    matrix.write([passed(NEWEST, "4 passed")])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    lines = [matrix.line(passed(OLDEST)), matrix.line(passed(NEWEST, "4 passed"))]
    assert "\n".join([*matrix.HEAD, *lines]) in text
    with pytest.raises(SystemExit, match="not every row passed"):
        matrix.write([passed(OLDEST), matrix.Result(NEWEST, matrix.NO_PYTHON, "no")])
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (install.NoPythonError("this host has no Python 3.12"), [], 0),
        (install.NotInstalledError("not installed in time: pip"), [], 1),
        (install.NotInstalledError("not installed: pip"), ["--missing", "report"], 0),
    ],
)
def test_a_row_that_cannot_run_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: install.NotInstalledError,
    words: list[str],
    code: int,
) -> None:
    def environment(self: install.Installer, row: Row) -> None:
        raise error

    monkeypatch.setattr(install.Installer, "environment", environment)
    monkeypatch.setattr(sys, "argv", ["matrix", "newest", *words])
    assert matrix.main() == code
    assert f"NOT RUN: newest: {error}" in capsys.readouterr().out


def test_a_host_without_a_python_is_told() -> None:
    with pytest.raises(install.NoPythonError, match=r"no Python 3\.99"):
        install.find_python("3.99")


def test_a_command_that_fails_is_an_error() -> None:
    installer = install.Installer(60)
    with pytest.raises(install.NotInstalledError, match="not installed"):
        installer._run(sys.executable, "-c", "raise SystemExit(3)")
    late = install.Installer(-1)
    with pytest.raises(install.NotInstalledError, match="not installed in time"):
        late._run(sys.executable, "-c", "import time; time.sleep(9)")
