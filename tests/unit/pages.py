"""The project's pages, and their blocks, commands, words and tables."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(path for path in ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:^(?: {4}.*)\n?)+", re.MULTILINE)


def name_of(page: Path) -> str:
    """``docs/api.md``."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language; "" for those that say none, and for indented ones."""
    text = page.read_text(encoding="utf-8")
    fenced = [body for said, body in _FENCED.findall(text) if said == language]
    if language:
        return fenced
    found = _INDENTED.findall(_FENCED.sub("", text))
    return fenced + [re.sub("^    ", "", block, flags=re.MULTILINE) for block in found]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def words(page: Path) -> list[str]:
    """What stands in backticks, outside of blocks; line breaks are blanks."""
    return [" ".join(word.split()) for word in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> Iterator[list[str]]:
    """Shell commands, as words: lines of blocks, continued ones joined, comments left out."""
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            if command := line.partition(" #")[0].split():
                yield command


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(page: Path, name: str) -> list[tuple[str, ...]]:
    """Rows of the table between ``<!-- name -->`` and ``<!-- /name -->``."""
    text = page.read_text(encoding="utf-8")
    body = text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    rows = [line.strip("| \n").split(" | ") for line in body.strip().splitlines()[2:]]
    return [tuple(cell.strip() for cell in row) for row in rows]
