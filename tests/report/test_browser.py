"""The page in headless Chromium: every mark is drawn, nothing overflows, the console is silent."""

import json
import subprocess
from html import unescape
from pathlib import Path

import pytest

from megatron_quant.report import Facts, page_of
from tests.report import CHROMIUM, REQUIRED
from tests.unit import report_world as world

pytestmark = pytest.mark.skipif(
    not (CHROMIUM or REQUIRED), reason="no Chromium: apt-get install chromium-headless-shell"
)
PROBE = """<script>
const marks = {};
for (const mark of document.querySelectorAll("svg .mark")) {
  const box = mark.getBoundingClientRect(), look = getComputedStyle(mark);
  const inked = [look.fill, look.stroke].some(c => c !== "none" && c !== "rgba(0, 0, 0, 0)");
  const name = mark.closest("section").id;
  marks[name] ??= [0, 0];
  marks[name][box.width + box.height > 0 && inked ? 0 : 1] += 1;
}
const root = document.documentElement;
document.title = JSON.stringify({
  marks, beyond: root.scrollWidth - root.clientWidth,
  paper: getComputedStyle(document.body).backgroundColor,
});
</script>"""
DARK = "--blink-settings=preferredColorScheme=0"


def opened(path: Path, width: int = 1200, *flags: str) -> tuple[str, list[str]]:
    """The page's elements once it is laid out, and what the console says."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--window-size={width},900", "--virtual-time-budget=2000", *flags, "--dump-dom"]
    done = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def measured(made: Facts, path: Path, width: int, *flags: str) -> dict:
    """What PROBE finds in a copy of the page that may run it."""
    page = page_of(made)
    policy = page[page.index('<meta http-equiv="Content-Security') :].partition(">")[0] + ">"
    path.write_text(page.replace(policy, "").replace("</body>", f"{PROBE}</body>"))
    shown, said = opened(path, width, *flags)
    assert said == []
    return json.loads(unescape(shown.partition("<title>")[2].partition("</title>")[0]))


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_every_mark_is_drawn_and_the_page_fits(width: int, dark: bool, tmp_path: Path) -> None:
    found = measured(world.facts(), tmp_path / "page.html", width, *([DARK] if dark else []))
    drawn = {name: count for name, (count, hidden) in found["marks"].items() if not hidden}
    assert drawn == {
        "sizes": 14 * 2,
        "errors": 7 * 4 + 1 + 2,
        "experts": 4 * 8 + 3 + 2,
        "inputs": 4 * 4,
        "frontier": 24 + 1 + 2 + 1,
        "choices": 12 + 3,
        "scores": 12 * 2 + 9 + 2,
        "times": 5,
    }
    assert found["beyond"] == 0
    assert found["paper"] == ("rgb(20, 22, 26)" if dark else "rgb(251, 251, 249)")


def test_an_evaluation_on_a_phone(tmp_path: Path) -> None:
    found = measured(world.evaluated(), tmp_path / "page.html", 390)
    assert found["marks"] == {"positions": [2 * (32 + 1), 0], "classes": [5, 0]}
    assert found["beyond"] == 0


@pytest.mark.parametrize("made", [world.facts(), world.evaluated()], ids=["quantize", "eval"])
def test_the_console_is_silent(made: Facts, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page_of(made))
    shown, said = opened(path)
    assert said == []
    assert shown.count("<svg") == page_of(made).count("<svg")


def test_the_console_would_say_that_something_is_loaded_or_run(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    for added in ("<script>var x = 1</script>", '<img src="other.png">'):
        path.write_text(page_of(world.evaluated()).replace("</body>", f"{added}</body>"))
        assert len(opened(path)[1]) == 1
