"""MXFP4 becomes NVFP4 with --keep-scales, and every value stays what it was."""

from pathlib import Path

import pytest
import torch

from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify import verify
from megatron_quant.errors import CheckpointError
from tests.unit import hf_models, sources

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
