"""The runner of the clients' tests: what it says of a release that cannot be tried."""

import sys

import pytest

from tests.clients import __main__ as clients
from tests.clients.releases import RELEASES
from tests.matrix import install


@pytest.mark.parametrize(
    ("error", "words", "said", "code"),
    [
        (install.NoPythonError("this host has no Python 3.11"), [], "NOT RUN", 0),
        (install.NotInstalledError("not installed in time: pip"), [], "failed", 1),
        (install.NotInstalledError("not installed: pip"), ["--missing", "report"], "NOT RUN", 0),
    ],
)
def test_a_release_that_cannot_be_tried_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: install.NotInstalledError,
    words: list[str],
    said: str,
    code: int,
) -> None:
    def base(self: install.Installer, version: str) -> None:
        raise error

    monkeypatch.setattr(install.Installer, "base", base)
    monkeypatch.setattr(sys, "argv", ["clients", RELEASES[0].name, *words])
    assert clients.main() == code
    assert f"{RELEASES[0].name}: {said}: {error}" in capsys.readouterr().out
