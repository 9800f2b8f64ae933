"""The page's style sheet, which is a file of the package."""

from functools import cache
from pathlib import Path


@cache
def style() -> str:
    """Return the style sheet."""
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")
