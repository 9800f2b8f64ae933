"""Docstrings speak English: the part of the rule that a program can read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_quant

PACKAGE = Path(megatron_quant.__file__).parent
INDIRECT = ("The same", "As", "Of", "What")
ARTICLES = {"The", "A", "An"}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def _first_words(docstring: str, number: int) -> str:
    return " ".join(docstring.split()[:number]).rstrip(",.:;")


def _faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS):
            continue
        docstring = ast.get_docstring(node) or ""
        first, name = _first_words(docstring, 1), getattr(node, "name", "the module")
        if first in INDIRECT or _first_words(docstring, 2) in INDIRECT:
            yield f"{name} begins with {docstring[:40]!r}"
        elif isinstance(node, FUNCTIONS) and first in ARTICLES:
            yield f"{name} begins with an article, not a verb: {docstring[:40]!r}"


def test_docstrings_begin_with_what_happens() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    faults = [
        f"{path.relative_to(PACKAGE)}: {fault}"
        for path in files
        for fault in _faults(path.read_text())
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("docstring", "count"),
    [
        ("Return the scale.", 0),
        ("The scale.", 1),
        ("A scale.", 1),
        ("The same, with a scale.", 1),
        ("As ``encode``.", 1),
        ("What is stored.", 1),
        ("Of a weight, its scale.", 1),
    ],
)
def test_the_rule_is_read(docstring: str, count: int) -> None:
    function = f'def f():\n    """{docstring}"""\n'
    assert len(list(_faults(function))) == count


def test_classes_and_modules_may_begin_with_an_article() -> None:
    assert not list(_faults('"""The module."""\nclass C:\n    """A thing."""\n'))
    assert len(list(_faults('"""What is here."""\nclass C:\n    """As a thing."""\n'))) == 2
