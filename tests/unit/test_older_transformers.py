"""transformers 4.57, which Megatron-Bridge 0.3 needs: no import asks for what it lacks."""

import ast
import sys
from pathlib import Path

import pytest
import torch

from megatron_quant.errors import CheckpointError
from megatron_quant.evaluation import activations

PACKAGE = Path(activations.__file__).parents[1]
# What 4.57.6 has, looked up there. Add a name only if it is there too; or import it where it is
# used, with a line that says what to install.
THERE = {
    "transformers": {
        *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"),
        *("AutoTokenizer", "DynamicCache", "PretrainedConfig", "PreTrainedModel"),
        *("PreTrainedTokenizerBase", "CONFIG_MAPPING"),
    },
    "transformers.utils": {"HF_MODULES_CACHE", "logging"},
}

NEWER = PACKAGE / "streaming" / "part_loading.py"
"""All that needs the loader of transformers 5, in one file."""


def imported(tree: ast.Module) -> set[tuple[str, str]]:
    """(module, name) of imports from transformers that are no function's own."""
    return {
        (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers")
        for alias in node.names
    }


def test_modules_import_what_it_has() -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if path != NEWER]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    found = set().union(*map(imported, trees))
    # Where it is missing, its importers do without: none of them is a module's top level.
    top = [ast.unparse(node) for tree in trees for node in tree.body]
    assert not any(NEWER.stem in line for line in top if line.startswith(("import", "from")))
    assert len(found) > 5
    assert {
        (module, name) for module, name in found if name not in THERE.get(module, set())
    } == set()


def test_evaluation_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    # Through the module that reads it: another import may have reloaded transformers (its own
    # clear_import_cache does), and then this file's name is another module.
    monkeypatch.setattr(activations.transformers, "__version__", "4.57.6")
    with pytest.raises(CheckpointError, match=r"transformers 4\.57\.6 does .* install .* 5\.0 or"):
        activations.saved_tags(torch.nn.Linear(2, 2))
