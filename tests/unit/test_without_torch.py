"""Modules of names, and the command line before its work, load neither torch nor Megatron."""

import subprocess
import sys

import pytest

from megatron_quant.ckpt.dialects.registry import DIALECT_NAMES, DIALECTS
from megatron_quant.engines.facts import ENGINES

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "modelopt", "megatron"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def without_torch(code: str) -> str:
    """What ``code`` prints in a process that can import no torch."""
    command = [sys.executable, "-c", BLOCKED + code]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_every_ready_recipe_is_loaded_without_torch() -> None:
    code = """
from megatron_quant.formats import FORMATS
from megatron_quant.recipes import audit, document, kv_cache, plan, resolve
from megatron_quant.recipes.load import load_recipe, recipe_names
for name in recipe_names():
    print(name, load_recipe(name).label(0))
"""
    lines = without_torch(code).splitlines()
    assert "nvfp4 rule 1: nvfp4+nvfp4" in "\n".join(lines)
    assert len(lines) > 15


def test_dialects_and_engines_are_named_without_torch() -> None:
    code = """
from megatron_quant.ckpt.dialects import DIALECT_NAMES
from megatron_quant.engines.facts import ENGINES
print(*DIALECT_NAMES, *ENGINES)
"""
    assert without_torch(code).split() == [*DIALECT_NAMES, *ENGINES]
    assert {name: dialect.name for name, dialect in DIALECTS.items()} == {
        n: n for n in DIALECT_NAMES
    }


@pytest.mark.parametrize("verb", [(), ("quantize",), ("export",), ("verify",), ("eval",)])
def test_help_comes_without_torch(verb: tuple[str, ...]) -> None:
    code = f"from megatron_quant.cli.main import main; main([*{verb!r}, '--help'])"
    assert without_torch(code).startswith(" ".join(["usage: megatron-quant", *verb]))


def test_argument_errors_come_without_torch() -> None:
    refused = {
        "--tp 0": "--tp is 0: give at least 1",
        "--act-percentile 0": "--act-percentile is 0: give a percentage above 0",
        "": "--export-dir is missing",
        "--stream": "--export-dir is missing",
        "--dry-run --megatron-load-path X": "--dry-run plans from config.json",
        "--dry-run --export-quant-cfg nvfp5": "unknown quantization config 'nvfp5'; choose one of",
        "--dry-run --export-quant-cfg mxfp8 --algorithm mse": "recipe 'mxfp8', rule 1",
    }
    code = f"""
from megatron_quant.cli.main import main
sys.stderr = sys.stdout
for flags in {list(refused)!r}:
    argv = ["quantize", "--hf-model-id", "M", "--export-quant-cfg", "fp8", *flags.split()]
    assert main(argv) == 1
assert main(["export", "--export-dir", "D", "--export-format", "awq"]) == 1
assert main(["eval", "D", "--text", "T", "--seq-length", "0"]) == 1
"""
    lines = without_torch(code).splitlines()
    others = ["export needs either", "--seq-length is 0: give at least 1"]
    for line, told in zip(lines, [*refused.values(), *others], strict=True):
        assert line.startswith(f"megatron-quant: error: {told}"), line
