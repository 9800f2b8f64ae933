"""Other libraries read an export from TP 2 x EP 2: transformers' reader, ModelOpt's packing."""

from pathlib import Path

import pytest
import torch

from megatron_quant.evaluation import decoded, native
from tests.dist import checkpoints
from tests.dist.test_layouts import export_all, folder, same_bytes, tensors
from tests.host import ready

ready()
from modelopt.torch.export.quant_utils import to_quantized_weight  # noqa: E402
from modelopt.torch.quantization.qtensor import NVFP4QTensor  # noqa: E402

IDS = torch.arange(48) * 11 % 250
# What transformers reads: no NVFP4 experts, and no fused experts that stay unquantized.
CELLS = [
    ("qwen3_moe", "fp8"),
    ("qwen3_moe", "int4"),
    ("qwen3", "fp8"),
    ("qwen3", "int4"),
    ("qwen3", "nvfp4"),
    ("qwen3", "w4a16_nvfp4"),
]


@pytest.mark.parametrize(("name", "recipe"), CELLS)
def test_transformers_reads_compressed_tensors(
    name: str, recipe: str, tmp_path: Path, ranks
) -> None:
    source = checkpoints.save(name, tmp_path / "source")
    case = {
        "export_quant_cfg": recipe,
        "export_format": "compressed-tensors",
        "cold_experts": "layer-max",
    }
    ep = 2 if name == "qwen3_moe" else 1
    ranks(4, export_all, source, tmp_path, 2, ep, 1, [case])
    expected = decoded(tmp_path / folder(case), torch.bfloat16)(IDS).float()
    found = native(tmp_path / folder(case), torch.bfloat16)(IDS).float()
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    if recipe in ("int4", "w4a16_nvfp4"):
        assert error.median() < 0.02  # bf16 rounding
        return
    # transformers quantizes inputs too, but not those of experts, and an input at the edge of a
    # step falls to either side: no farther apart than quantization itself moved the logits.
    plain = decoded(source, torch.bfloat16)(IDS).float()
    noise = (expected - plain).norm(dim=-1) / plain.norm(dim=-1)
    assert error.median() < noise.median()


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4", "w4a16_nvfp4"])
def test_bytes_are_modelopts_own(recipe: str, tmp_path: Path, ranks) -> None:
    source = checkpoints.save("qwen3_moe", tmp_path / "source")
    case = {"export_quant_cfg": recipe, "cold_experts": "layer-max"}
    ranks(4, export_all, source, tmp_path, 2, 2, 1, [case])
    found, weights = tensors(tmp_path / folder(case)), tensors(source)
    quantized = [n for n in weights if n.removesuffix(".weight") + ".weight_scale" in found]
    assert len(quantized) == 2 * (4 + 8 * 3)
    for name in quantized:
        amax = fused_amax(name, weights)
        for suffix, expected in packed(weights[name], amax, recipe).items():
            stored = found[name.removesuffix("weight") + suffix]
            assert same_bytes(stored, expected), (name, suffix)


def fused_amax(name: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The largest magnitude of all weights that share ``name``'s scale, from the source itself."""
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    qkv, gate_up = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    leaf = name.split(".")[-2]
    fused = next((group for group in (qkv, gate_up) if leaf in group), (leaf,))
    prefix = f"model.layers.{layer}.{rest.split('.')[0]}."
    members = [w for n, w in weights.items() if n.startswith(prefix) and n.split(".")[-2] in fused]
    return max(w.abs().max() for w in members).float()


def packed(w: torch.Tensor, amax: torch.Tensor, recipe: str) -> dict[str, torch.Tensor]:
    if recipe == "fp8":
        scale = amax / 448
        return {"weight": to_quantized_weight(w, scale, "fp8"), "weight_scale": scale}
    scale = amax / (6 * 448)
    block_scale, _ = NVFP4QTensor.get_weights_scaling_factor(w, 16, scale)
    codes = to_quantized_weight(w, block_scale, "nvfp4", scale, 16)
    return {"weight": codes, "weight_scale": block_scale, "weight_scale_2": scale}
