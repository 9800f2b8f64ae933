"""Presets of ModelOpt are data: reading one imports neither Transformer Engine nor Megatron."""

import json
import subprocess
import sys
from pathlib import Path

from tests.dist import checkpoints

_SCRIPT = """
import sys
from itertools import product
from megatron_quant.cli.main import main
from megatron_quant.errors import RecipeError
from megatron_quant.recipes.modelopt_module import modelopt_config
from megatron_quant.recipes.modelopt_presets import load_preset

class Refused:
    def find_spec(self, name, path=None, target=None):
        # torch and transformers ask for the first where it is installed, and go on without it
        assert name.split(".")[0] not in ("transformer_engine", "megatron"), name

sys.meta_path.insert(0, Refused())
checkpoint, dense, out = sys.argv[1:]
argv = ["quantize", "--stream", "--export-quant-cfg", "W4A16_NVFP4_CFG", "--weight-only"]
assert main([*argv, "--hf-model-id", checkpoint, "--export-dir", out]) == 0
argv = ["quantize", "--stream", "--dry-run", "--hf-model-id"]
taken = []
for name in sorted(modelopt_config().choices):
    try:
        load_preset(name)
    except RecipeError:
        continue
    # some are for dense models alone, some for experts, and each dialect lacks some
    plans = product((checkpoint, dense), ("modelopt", "compressed-tensors"))
    assert any(
        main([*argv, model, "--export-quant-cfg", name, "--export-format", dialect]) == 0
        for model, dialect in plans
    ), name
    taken.append(name)
sys.meta_path.pop(0)
loaded = [n for n in sys.modules if n.startswith(("modelopt.torch", "transformer_engine"))]
assert not loaded, loaded

from megatron_quant import cpu

cpu.activate()  # it refuses where any of them was imported
alone = modelopt_config()
from modelopt.torch.quantization import config

assert alone is not config and alone.choices == config.choices
for name in alone.choices:
    assert getattr(alone, name) == getattr(config, name), name
    assert modelopt_config() is alone
print("taken", *taken)
"""


def test_presets_are_streamed_on_a_host_that_nothing_was_readied_for(tmp_path: Path) -> None:
    checkpoint = checkpoints.save("qwen3_moe", tmp_path / "model", num_hidden_layers=1)
    dense, out = (
        checkpoints.save("qwen3", tmp_path / "dense", num_hidden_layers=1),
        tmp_path / "out",
    )
    ended = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(checkpoint), str(dense), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-2000:]
    taken = ended.stdout.splitlines()[-1].split()
    assert taken[0] == "taken" and len(taken) > 10
    assert {"NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG", "MXFP8_DEFAULT_CFG"} <= set(taken)
    written = json.loads((out / "hf_quant_config.json").read_text())
    assert written["quantization"]["quant_algo"] == "W4A16_NVFP4"
