"""MXFP4 becomes NVFP4 with --keep-scales, and every value stays what it was."""

import json
from pathlib import Path

import pytest
import torch

from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify import verify
from megatron_quant.errors import CheckpointError
from tests.unit import family_models, hf_models, sources

EXPERT = "model.layers.1.mlp.experts.2"
FLAGS = {"export_quant_cfg": "w4a16_nvfp4", "keep_scales": True}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in MXFP4, whose tensors have groups of very different sizes."""
    directory = tmp_path_factory.mktemp("released")
    source = hf_models.save("glm4_moe", directory / "source")

    def spread(found: sources.Tensors) -> None:
        for name in [n for n in found if n.endswith("_proj.weight")]:
            found[name][::3] *= 2.0**-9
            found[name][0] = 0

    sources.edit(source, spread)
    sources.run(source, directory / "mxfp4", export_quant_cfg="mxfp4")
    return directory / "mxfp4"


def in_nvfp4(source: Path, out: Path, dialect: str) -> QuantizedCheckpoint:
    sources.run(source, out, export_format=dialect, **FLAGS)
    return QuantizedCheckpoint(out)


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_no_value_is_rounded_a_second_time(released: Path, dialect: str, tmp_path: Path) -> None:
    before, after = QuantizedCheckpoint(released), in_nvfp4(released, tmp_path / "out", dialect)
    assert not verify(tmp_path / "out", released).problems
    assert after.modules.keys() == before.modules.keys()
    for module in before.modules:
        assert after.modules[module].weights.name == "nvfp4"
        name = f"{module}.weight"
        assert torch.equal(after.weight(name, torch.float32), before.weight(name, torch.float32)), (
            name
        )


def test_without_the_flag_values_move(released: Path, tmp_path: Path) -> None:
    sources.run(released, tmp_path / "out", export_quant_cfg="w4a16_nvfp4")
    name, before = f"{EXPERT}.up_proj.weight", QuantizedCheckpoint(released)
    after = QuantizedCheckpoint(tmp_path / "out").weight(name, torch.float32)
    assert not torch.equal(after, before.weight(name, torch.float32))


def test_fused_weights_share_their_tensor_scale(released: Path, tmp_path: Path) -> None:
    in_nvfp4(released, tmp_path / "out", "modelopt")
    found = sources.tensors(tmp_path / "out")
    scales = {found[f"{EXPERT}.{p}_proj.weight_scale_2"].item() for p in ("gate", "up")}
    assert len(scales) == 1 and scales.pop().hex().startswith("0x1.0000000000000p")


def lowered(released: Path, to: Path, code: int, zeros: bool) -> Path:
    """``released`` with one group whose scale is far below the others'."""
    found = sources.tensors(released)
    to.mkdir()
    for file in released.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (to / file.name).write_bytes(file.read_bytes())
    found[f"{EXPERT}.up_proj.weight_scale"][4, 1] = code
    if zeros:
        found[f"{EXPERT}.up_proj.weight_packed"][4, 16:32] = 0
    sources.write(to, found)
    return to


def test_scales_that_nvfp4_cannot_hold_are_named(released: Path, tmp_path: Path) -> None:
    source = lowered(released, tmp_path / "source", 90, zeros=False)
    said = rf"{EXPERT}.gate_proj and {EXPERT}.up_proj reach over \d+ powers of two, and NVFP4"
    with pytest.raises(CheckpointError, match=said):
        in_nvfp4(source, tmp_path / "out", "modelopt")
    assert not (tmp_path / "out").exists()


def test_scales_of_zeros_need_not_be_held(released: Path, tmp_path: Path) -> None:
    source = lowered(released, tmp_path / "source", 20, zeros=True)
    name = f"{EXPERT}.up_proj.weight"
    after = in_nvfp4(source, tmp_path / "out", "modelopt").weight(name, torch.float32)
    assert torch.equal(after, QuantizedCheckpoint(source).weight(name, torch.float32))


FAMILIES = {  # routed experts of each: MXFP4 as Kimi-K3 has them, INT4 as Kimi-K2.5 has
    "kimi_linear": ("model.layers.1.block_sparse_moe.experts", "mxfp4"),
    "kimi_k25": ("language_model.model.layers.1.mlp.experts", "kimi_k2"),
}


def released_as(family: str, recipe: str, directory: Path) -> Path:
    """The family in that form, with its config where Kimi-K2.5 has it: in the text decoder's."""
    source, out = family_models.save(family, directory / "source"), directory / "released"
    sources.run(source, out, export_quant_cfg=recipe)
    config = sources.config(out)
    if "text_config" in config:
        said = config.pop("quantization_config")
        config["text_config"]["quantization_config"] = said
        (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_kimis_releases_become_nvfp4(family: str, tmp_path: Path) -> None:
    """Exactly from MXFP4. INT4 has sevens and fives, which E2M1 lacks: those are rounded once."""
    at, recipe = FAMILIES[family]
    if recipe == "mxfp4":
        (tmp_path / "experts.yaml").write_text(
            "rules: [{quantize: ['*.experts.*'], weights: mxfp4}, {exclude: ['*']}]"
        )
        recipe = str(tmp_path / "experts.yaml")
    source, out = released_as(family, recipe, tmp_path), tmp_path / "out"
    (tmp_path / "nvfp4.yaml").write_text(
        "rules: [{quantize: ['*.experts.*'], weights: nvfp4}, {exclude: ['*']}]"
    )
    exact = family == "kimi_linear"
    flags = {"export_quant_cfg": str(tmp_path / "nvfp4.yaml"), "export_format": "modelopt"}
    sources.run(source, out, keep_scales=exact, **flags)
    assert not verify(out, source).problems
    before, after = QuantizedCheckpoint(source), QuantizedCheckpoint(out)
    experts = [m for m in after.modules if m.startswith(f"{at}.3.")]
    assert len(experts) == 3 and experts == [m for m in before.modules if m in experts]
    for module in experts:
        name = f"{module}.weight"
        values = [c.weight(name, torch.float32) for c in (before, after)]
        assert torch.equal(*values) is exact
        lost = (values[0] - values[1]).norm() / values[0].norm()
        assert lost == 0 if exact else 0 < lost < 0.15


def test_kimis_int4_keeps_its_codes(tmp_path: Path) -> None:
    source = released_as("kimi_k25", "kimi_k2", tmp_path)
    sources.run(source, tmp_path / "out", export_quant_cfg="kimi_k2", keep_scales=True)
    before, after = (sources.tensors(d) for d in (source, tmp_path / "out"))
    assert after.keys() == before.keys() and any(n.endswith("weight_packed") for n in before)
    assert all(torch.equal(after[name], w) for name, w in before.items())
    said = sources.config(tmp_path / "out")
    assert "quantization_config" in said and "quantization_config" not in said["text_config"]
