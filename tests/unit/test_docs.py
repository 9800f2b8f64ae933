"""The pages are true of the code: links, files, names, flags, tables and the walk."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_quant.models.registry import ARCHITECTURES
from tests.unit import pages
from tests.unit.test_rooms import FACES, MAY_IMPORT, MODULES

ROOT = pages.ROOT
PACKAGE = ROOT / "megatron_quant"
PRESENT = [page for page in pages.PAGES if page.name != "CHANGELOG.md"]
"""Pages that speak of what is there; a changelog names what is gone too."""
KEYS = {"megatron_quant.description"}
"""Keys of checkpoints that look like names of the package."""


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", pages.prose(page)):
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in pages.anchors(target)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", PRESENT, ids=pages.name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    """A path in backticks is one from the root, from the package, or from the page's folder."""
    roots = (ROOT, PACKAGE, page.parent)
    named = (word.split("::")[0] for word in pages.words(page))
    paths = {word for word in named if re.fullmatch(r"[\w./-]+/[\w.-]+\.(py|pyi|md|yaml)", word)}
    missing = [
        path
        for path in sorted(paths)
        if "NAME" not in path and not any((r / path).exists() for r in roots)
    ]
    assert missing == []


@pytest.mark.parametrize("page", PRESENT, ids=pages.name_of)
def test_names_of_the_package_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    imported = (
        f"{module}.{name}"
        for module, names in re.findall(r"from (megatron_quant[\w.]*) import ([\w, ]+)", text)
        for name in re.split(r",\s*", names)
    )
    dotted = re.findall(r"\bmegatron_quant(?:\.[A-Za-z_]\w*)+", text)
    front = (f"megatron_quant.{name}" for name in re.findall(r"\bmq\.([A-Za-z_]\w*)", text))
    names = {name for name in (*imported, *dotted, *front) if not name.endswith(".py")} - KEYS
    assert [name for name in sorted(names) if not exists(name)] == []


def exists(name: str) -> bool:
    """Whether ``megatron_quant.a.b`` is a module, or a name of one or of a face."""
    if name in MODULES:
        return True
    module, _, last = name.rpartition(".")
    folder = ROOT / module.replace(".", "/")
    found = [p for p in (folder.with_suffix(".py"), folder / "__init__.pyi") if p.exists()]
    return any(last in defined(p) for p in found)


def defined(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(ast.unparse(target) for target in targets)
    return names


def test_names_are_looked_up() -> None:
    assert exists("megatron_quant.quantize") and exists("megatron_quant.formats.encode")
    assert exists("megatron_quant.mcore.training.train_state.save_run")
    assert not exists("megatron_quant.api") and not exists("megatron_quant.formats.nothing")


def test_the_rooms_of_the_architecture_are_those_of_the_code() -> None:
    written = {}
    for room, _, may in pages.table(ROOT / "docs" / "architecture.md", "rooms"):
        written[room.strip("`").replace("front door", "")] = set(expanded(may.split(", ")))
    assert written == MAY_IMPORT


_TEXT = ("errors", "documents", "fields")
_BASE = (*_TEXT, "formats", "recipes")
_CKPT = tuple(f"ckpt.{room}" for room in ("storage", "dialects", "read", "plan", "write", "verify"))
_WORDS: dict[str, tuple[str, ...]] = {
    "-": (),
    "front door": ("",),
    "text": _TEXT,
    "base": _BASE,
    "stored": (*_BASE, "models", "native", "ckpt.storage"),
    "live": (
        *_BASE,
        *_CKPT,
        *("alike", "rendezvous", "dist", "models", "layers", "calib", "cpu", "evaluation"),
    ),
}
"""What the page's words for several rooms stand for, as its text above the table says."""


def expanded(rooms: list[str]) -> Iterator[str]:
    for room in rooms:
        yield from _WORDS.get(room, (room,))


def test_the_walk_from_an_amax_to_bytes_is_the_codes() -> None:
    rows = pages.table(ROOT / "docs" / "architecture.md", "walk")
    assert len({file for file, *_ in rows}) <= 8
    front = FACES["__init__.pyi"]
    shown = {a.name for n in front.body if isinstance(n, ast.ImportFrom) for a in n.names}
    for file, function, what, calls in rows:
        tree = ast.parse((PACKAGE / file.strip("`")).read_text())
        body = found(tree, function.strip("`"))
        named = re.findall(r"`([\w.]+)`", calls)
        used = {node.attr for node in ast.walk(body) if isinstance(node, ast.Attribute)}
        used |= {node.id for node in ast.walk(body) if isinstance(node, ast.Name)}
        assert named and set(named) <= used, (file, function)
        assert set(re.findall(r"`(_\w+)`", what)) <= used, (file, function)
    assert {"quantize", "export"} <= shown
    assert next(function for _, function, *_ in rows) == "`quantize`"


def found(tree: ast.AST, name: str) -> ast.AST:
    """The function or ``Class.method`` of a module."""
    for part in name.split("."):
        tree = next(
            node
            for node in ast.iter_child_nodes(tree)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
        )
    return tree


def test_the_readme_is_two_screens_and_every_page_is_reached_from_it() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 80
    seen, left = set(), [readme]
    while left:
        page = left.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", pages.prose(page))
        left += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert set(pages.PAGES) - seen == set()


def test_pre_commit_checks_what_make_lint_checks() -> None:
    makefile = (ROOT / "Makefile").read_text()
    lint = makefile.split("\nlint: env\n")[1].split("\n\n")[0]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    said = [line.strip().replace("$(BIN)", ".venv/bin") for line in lint.splitlines()]
    assert [hook["entry"] for hook in hooks] == said


def test_the_tables_of_formats_are_those_that_the_script_makes() -> None:
    path = ROOT / "docs" / "formats_table.py"
    spec = importlib.util.spec_from_file_location("formats_table", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.tables() in script.PAGE.read_text(encoding="utf-8")


def test_every_model_with_a_table_has_its_row() -> None:
    page = (ROOT / "docs" / "architectures.md").read_text()
    assert [name for name in ARCHITECTURES if f"`{name}`" not in page] == []
