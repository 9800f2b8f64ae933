"""The package's rooms, checked on the sources alone: who imports whom, and through which door."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "megatron_quant"
ROOT = Path(__file__).parents[2] / PACKAGE

_TEXT = {"errors", "documents", "fields"}
_BASE = _TEXT | {"formats", "recipes"}
_STORED = _BASE | {"models", "native", "ckpt.storage"}
_CKPT = {f"ckpt.{room}" for room in ("storage", "dialects", "read", "plan", "write", "verify")}
_LIVE = (
    _BASE
    | _CKPT
    | {"alike", "rendezvous", "dist", "models", "layers", "calib", "cpu", "evaluation"}
)
_MCORE = {f"mcore.{room}" for room in ("model", "checkpoint", "live", "search", "training")}
_ALL = _LIVE | _MCORE | {"native", "engines", "ckpt", "streaming", "search", "folding", "report"}
# A room is a package with a face, or a module of the package itself. "ckpt", "mcore" and "engines"
# hold rooms; ckpt's own face is that of ckpt/convert.py. "" is the front door.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "documents": {"errors"},
    "faults": {"errors", "documents"},
    "fields": {"errors", "documents"},
    "dist": {"errors", "faults"},
    "alike": {"errors", "faults", "dist"},
    "rendezvous": {"errors", "faults", "alike", "dist"},
    "rounding": {"errors", "formats", "native"},
    "folding": _TEXT | {"formats", "models", "recipes", "rounding"},
    "weight_inputs": set(),
    "transformers_config": {"errors", "documents", "models", "engines.families"},
    "native": {"errors"},
    "formats": {"errors", "native"},
    "models": _TEXT | {"engines.families"},
    "recipes": _TEXT | {"formats"},
    "engines": _BASE | {"models", "ckpt.dialects", "engines.families"},
    "engines.families": set(),
    "cpu": {"errors"},
    "layers": _BASE | {"native"},
    "calib": _BASE | {"dist", "layers", "ckpt.storage", "rounding", "folding"},
    "ckpt.storage": _TEXT | {"native", "models"},
    "ckpt.dialects": _STORED | {"engines.families"},
    "ckpt.read": _STORED | {"ckpt.dialects", "folding"},
    "ckpt.plan": _STORED | {"ckpt.dialects"},
    "ckpt.write": _STORED | {"", "dist", "ckpt.dialects", "ckpt.plan", "folding"},
    "ckpt.verify": _STORED | {"ckpt.dialects", "ckpt.read", "ckpt.plan"},
    "ckpt": _STORED | _CKPT,
    "evaluation": _BASE
    | {"dist", "models", "weight_inputs", "ckpt.read", "transformers_config"}
    | {"engines.families"},
    "streaming": _BASE
    | {"dist", "models", "rounding", "weight_inputs", "engines.families", "folding"}
    | {"transformers_config"}
    | _CKPT,
    "search": _BASE
    | {"dist", "models", "weight_inputs", "ckpt.dialects", "ckpt.read", "ckpt.storage"}
    | {"evaluation", "streaming"},
    "mcore.model": _LIVE,
    "mcore.checkpoint": _LIVE | {"", "mcore.model"},
    "mcore.live": _LIVE | {"mcore.model", "mcore.checkpoint", "folding"},
    "mcore.search": _LIVE | {"search", "mcore.model", "mcore.live"},
    "mcore.training": _LIVE | {"mcore.model", "mcore.checkpoint", "mcore.live"},
    "report": {"errors", "documents"},
    "runs": _ALL | {"faults", ""},
    "": _ALL | {"runs"},
    # errors, and documents for names that a terminal can show; ranks tell each other of faults.
    "cli": {"", "errors", "documents", "faults", "rendezvous"},
    "__main__": {"cli"},
}
HOLD_ROOMS = ("ckpt", "mcore", "engines")
WITHOUT_FACES = ("ckpt", "mcore", "cli")
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
        "runs/",
    ),
    "modelopt": ("layers/", "recipes/modelopt_module.py"),
    "datasets": ("calib/hub.py",),
    "rich": ("cli/",),
    "yaml": ("documents.py",),
    "regex": ("ckpt/dialects/expressions.py",),
    "argparse": ("cli/",),
    "mlflow": ("report/mlflow_run.py",),
}
LONGEST_FILE, LONGEST_FUNCTION = 400, 80

FILES = {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in sorted(ROOT.rglob("*.py"))}
FACES = {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in sorted(ROOT.rglob("*.pyi"))}


SHOWN = {
    f"{PACKAGE}.{'.'.join(Path(face).parent.parts)}.{alias.name}"
    for face, tree in FACES.items()
    for node in tree.body
    if isinstance(node, ast.ImportFrom) and not node.module
    for alias in node.names
}
"""Modules that a face shows as they are."""


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
PACKAGES = {name_of(file) for file in FILES if file.endswith("__init__.py")} - {PACKAGE}


def module_of(imported: str) -> str:
    """The module of the package that ``imported``, a module or a name in one, is of."""
    return imported if imported in MODULES else imported.rpartition(".")[0]


def room_of(module: str) -> str:
    parts = module.split(".")[1:]
    if not parts:
        return ""
    if parts[0] in HOLD_ROOMS and f"{parts[0]}.{'.'.join(parts[1:2])}" in MAY_IMPORT:
        return ".".join(parts[:2])
    return parts[0]


def own_imports(file: str) -> set[str]:
    found = [name for name in imports(FILES[file]) if name.split(".")[0] == PACKAGE]
    return {module_of(name) for name in found if name not in SHOWN} | {
        name.rpartition(".")[0] for name in found if name in SHOWN
    }


def behind_a_face(importer: str, module: str) -> bool:
    """Whether ``module`` lies in a package that ``importer`` is not in, but for its face."""
    room = f"{PACKAGE}.{room_of(module)}"
    packages = [
        p for p in PACKAGES if module.startswith(f"{p}.") and f"{p}.".startswith(f"{room}.")
    ]
    return any(
        not f"{importer}.".startswith(f"{p}.")
        for p in packages
        if p.removeprefix(f"{PACKAGE}.") not in WITHOUT_FACES
    )


@pytest.mark.parametrize("room", list(MAY_IMPORT))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    edges = [
        f"{file} imports {module}"
        for file in FILES
        if room_of(name_of(file)) == room
        for module in own_imports(file)
        if room_of(module) not in MAY_IMPORT[room] | {room}
    ]
    assert edges == []


def test_other_rooms_are_entered_by_their_face() -> None:
    inside = [
        f"{file} imports {module}"
        for file in FILES
        for module in sorted(own_imports(file))
        if behind_a_face(name_of(file), module)
    ]
    assert inside == []


@pytest.mark.parametrize("face", list(FACES))
def test_a_face_names_what_others_use(face: str) -> None:
    """``__all__`` is what the stub imports; no name hides a module of the room; all are found."""
    tree, folder = FACES[face], (ROOT / face).parent
    named = [a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
    assert sorted(named) == sorted(set(named)), "a name twice"
    (listed,) = [n.value for n in tree.body if isinstance(n, ast.Assign)]
    assert sorted(ast.literal_eval(listed)) == sorted(named)
    siblings = {p.stem for p in folder.glob("*.py")} | {p.name for p in folder.iterdir()}
    modules = {
        a.name for n in tree.body if isinstance(n, ast.ImportFrom) and not n.module for a in n.names
    }
    assert not set(named) & siblings - modules


def test_a_face_names_nothing_that_nobody_uses() -> None:
    used: dict[str, set[str]] = {}
    outside = (ROOT.parent / "tests", ROOT.parent / "examples", ROOT.parent / "benchmarks")
    trees = [ast.parse(p.read_text()) for folder in outside for p in folder.rglob("*.py")]
    for face, tree in FACES.items():
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = f"{name_of(face.removesuffix('i'))}.{node.module}"
                used.setdefault(inner, set()).update(a.name for a in node.names)
    for tree in (*FILES.values(), *trees):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
                used.setdefault(node.module, set()).update(a.name for a in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used.setdefault(f"{PACKAGE}.{node.value.id}", set()).add(node.attr)
    front = {
        a.name for n in FACES["__init__.pyi"].body if isinstance(n, ast.ImportFrom) for a in n.names
    }
    unused = [
        f"{face}: {alias.name}"
        for face, tree in FACES.items()
        if face != "__init__.pyi"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name not in used.get(name_of(face.removesuffix("i")), set()) | front
    ]
    assert unused == []


def test_every_room_is_in_the_table() -> None:
    assert {room_of(module) for module in MODULES} == set(MAY_IMPORT) | {"mcore"}
    unknown = {m for file in FILES for m in own_imports(file)} - MODULES
    assert unknown == set()


def test_no_cycle_of_rooms() -> None:
    rooms: dict[str, set[str]] = {}
    for file in FILES:
        if file == "__init__.py":
            continue
        room = room_of(name_of(file))
        rooms.setdefault(room, set()).update(map(room_of, own_imports(file)))
    left = {room: needs - {room, ""} for room, needs in rooms.items()}
    while free := [room for room, needs in left.items() if not needs & left.keys()]:
        for room in free:
            del left[room]
    assert left == {}, "these import one another"


def test_no_import_cycle() -> None:
    left = {
        name_of(file): own_imports(file) - {name_of(file), *PACKAGES, PACKAGE} for file in FILES
    }
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}, "these import one another"


def test_files_and_functions_are_short() -> None:
    long = [
        f"{file}: {lines} lines"
        for file in FILES
        if (lines := len((ROOT / file).read_text().splitlines())) > LONGEST_FILE
    ]
    long += [
        f"{file}: {node.name}"
        for file, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    ]
    assert long == []


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
    assert behind_a_face("megatron_quant.runs.job", "megatron_quant.ckpt.plan.export_plan")
    assert behind_a_face("megatron_quant.runs.job", "megatron_quant.engines.facts")
    assert behind_a_face("megatron_quant.models.moe", "megatron_quant.engines.families.every")
    assert not behind_a_face("megatron_quant.models.moe", "megatron_quant.engines.families")
    assert not behind_a_face("megatron_quant.runs.job", "megatron_quant.ckpt.plan")
    assert not behind_a_face("megatron_quant.ckpt.plan.ranks", "megatron_quant.ckpt.plan.shards")
    assert behind_a_face("megatron_quant.formats.codec", "megatron_quant.formats.blocks.rows")


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
