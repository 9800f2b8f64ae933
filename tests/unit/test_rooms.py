"""Who may import whom: the package's rooms, checked on the sources alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "megatron_quant"
ROOT = Path(__file__).parents[2] / PACKAGE

_LOWER = {"errors", "documents", "fields", "formats", "recipes"}
_CALIB = _LOWER | {"dist", "layers"}
_CORE = _CALIB | {"alike", "rendezvous", "calib", "cpu", "ckpt", "models", "evaluate"}
_ALL = _CORE | {"mcore", "stream"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "documents": {"errors"},
    "faults": {"errors", "documents"},
    "fields": {"errors", "documents"},
    "dist": {"errors", "faults"},
    "alike": {"errors", "faults", "dist"},
    "rendezvous": {"errors", "faults", "alike"},
    "formats": {"errors"},
    "models": {"errors", "documents", "fields"},
    "recipes": {"errors", "documents", "formats"},
    "rounding": {"errors", "formats"},
    "cpu": {"errors"},
    "layers": _LOWER,
    "calib": _CALIB,
    "ckpt": _LOWER | {"dist", "models"},
    "evaluate": _LOWER | {"dist", "models", "ckpt"},
    "stream": _LOWER | {"dist", "models", "ckpt"},
    "mcore": _CORE,
    "api": _ALL,
    "cli": _ALL | {"api", "faults"},
    "__main__": _ALL | {"api", "cli"},
}
# An outside library, and the rooms or files that may import it.
OWNERS = {
    "transformer_engine": ("cpu/", "mcore/", "layers/te.py"),
    "megatron.core.extensions": ("cpu/", "mcore/", "layers/te.py"),
    "megatron": (
        "cpu/",
        "mcore/",
        "layers/te.py",
        "layers/experts.py",
        "layers/sharded.py",
        "api/",
    ),
    "modelopt": ("layers/", "recipes/modelopt_module.py"),
    "datasets": ("calib/hub.py",),
    "rich": ("cli/",),
    "yaml": ("documents.py",),
    "regex": ("ckpt/dialects/expressions.py",),
    "argparse": ("cli/",),
}

FILES = {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in sorted(ROOT.rglob("*.py"))}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported in the file, in functions and for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(file: str) -> str:
    """``calib/data.py`` -> ``megatron_quant.calib.data``, a package's __init__ -> the package."""
    parts = Path(file).with_suffix("").parts
    return ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {name_of(file) for file in FILES}


def module_of(imported: str) -> str:
    """The module of the package that ``imported``, a module or a name in one, is of."""
    return imported if imported in MODULES else imported.rpartition(".")[0]


def room_of(module: str) -> str:
    return module.split(".")[1]


def own_imports(file: str) -> set[str]:
    found = (name for name in imports(FILES[file]) if name.split(".")[0] == PACKAGE)
    return {module_of(name) for name in found} - {PACKAGE}


@pytest.mark.parametrize("room", list(MAY_IMPORT))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    edges = [
        f"{file} imports {module}"
        for file in FILES
        if file.split("/")[0].removesuffix(".py") == room
        for module in own_imports(file)
        if room_of(module) not in MAY_IMPORT[room] | {room}
    ]
    assert edges == []


def test_every_room_is_in_the_table() -> None:
    rooms = {room_of(module) for module in MODULES if module != PACKAGE}
    assert rooms == set(MAY_IMPORT)
    unknown = {m for file in FILES for m in own_imports(file)} - MODULES
    assert unknown == set()


def test_no_import_cycle() -> None:
    left = {name_of(file): own_imports(file) - {name_of(file)} for file in FILES}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}, "these import one another"


@pytest.mark.parametrize("library", list(OWNERS))
def test_a_library_is_imported_by_its_owners_only(library: str) -> None:
    others = {
        file
        for file, tree in FILES.items()
        for name in imports(tree)
        if f"{name}.".startswith(f"{library}.") and not file.startswith(OWNERS[library])
    }
    assert others == set()


def test_only_the_cpu_room_replaces_anything_in_another_library() -> None:
    """As far as the source shows it: no setattr, MethodType or assignment to an imported module."""
    found = [
        f"{file}:{line}"
        for file, tree in FILES.items()
        if not file.startswith("cpu/")
        for line in replacements(tree)
    ]
    assert found == []


def replacements(tree: ast.AST) -> Iterator[int]:
    """Lines that set an attribute on something imported, by ``=``, setattr or MethodType."""
    roots = {(a.asname or a.name).split(".")[0] for a in aliases(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("setattr", "MethodType", "types.MethodType"):
                yield node.lineno
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Attribute) and root(t) in roots for t in targets):
                yield node.lineno


def aliases(tree: ast.AST) -> Iterator[ast.alias]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from node.names


def root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def test_the_checks_see_what_they_look_for() -> None:
    tree = ast.parse("def f():\n import a.b\n from c import d\n a.b.e = 1\n setattr(d, 'x', 1)")
    assert sorted(imports(tree)) == ["a.b", "c.d"]
    assert list(replacements(tree)) == [4, 5]


def test_dataclasses_of_many_fields_are_made_by_name() -> None:
    """More than four fields in a row of commas: nobody sees which is which."""
    found = [
        f"{file}:{node.lineno} {node.name}"
        for file, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and is_positional(node)
    ]
    assert found == []


def is_positional(node: ast.ClassDef) -> bool:
    """Whether it is a dataclass with more than four fields that calls may give by place."""
    decorators = [d for d in map(ast.unparse, node.decorator_list) if "dataclass" in d]
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    return bool(decorators) and len(fields) > 4 and "kw_only=True" not in decorators[0]


def test_many_fields_are_seen() -> None:
    made = "@dataclass{}\nclass A:\n" + "".join(f" {name}: int\n" for name in "abcde")
    (plain,) = ast.parse(made.format("(frozen=True)")).body
    (named,) = ast.parse(made.format("(frozen=True, kw_only=True)")).body
    assert isinstance(plain, ast.ClassDef) and isinstance(named, ast.ClassDef)
    assert is_positional(plain) and not is_positional(named)
