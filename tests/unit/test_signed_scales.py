"""INT4 scales below 0, as AutoRound writes them, are verified, and kept where engines take them."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.errors import FormatError
from megatron_quant.models import whole
from tests.dist import checkpoints
from tests.unit.test_stream_inputs import run

DIALECTS = ("auto-round", "gptq", "compressed-tensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    sizes = {"num_experts": 2, "num_hidden_layers": 1}
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"), **sizes)


def signed(directory: Path) -> Path:
    """Negate every other scale."""
    file = directory / "model.safetensors"
    tensors, metadata = load_file(file), safe_open(file, "pt").metadata()
    scales = [name for name in tensors if name.endswith(("scales", "weight_scale"))]
    assert len(scales) > 6
    for name in scales:
        tensors[name].view(-1)[::2] *= -1
    save_file(tensors, file, metadata=metadata)
    return directory


def decoded(directory: Path) -> dict[str, torch.Tensor]:
    found = QuantizedCheckpoint(directory)
    return {n: found.read(n, whole(i.shape)) for n, i in found.dense().items()}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_they_are_verified_and_kept(dialect: str, source: Path, tmp_path: Path) -> None:
    plain = {"export_quant_cfg": "int4", "export_format": dialect}
    run(source, tmp_path / "first", **plain)
    before = decoded(tmp_path / "first")
    packed = signed(tmp_path / "first")
    after = decoded(packed)
    changed = [n for n in after if not torch.equal(after[n], before[n])]
    assert len(changed) > 6 and all(torch.equal(after[n].abs(), before[n].abs()) for n in after)
    assert verify(packed, None).problems == ()
    for other in DIALECTS:
        flags = {"export_quant_cfg": "int4", "export_format": other, "keep_scales": True}
        run(packed, tmp_path / other, **flags)
        kept = decoded(tmp_path / other)
        assert kept.keys() == after.keys()
        assert [n for n in after if not torch.equal(kept[n], after[n])] == []
    flags = {"export_quant_cfg": "int4", "export_format": "modelopt", "keep_scales": True}
    with pytest.raises(FormatError, match=r"would hold scales from -.*, which int4 cannot decode"):
        run(packed, tmp_path / "modelopt", **flags)
    assert not (tmp_path / "modelopt").exists()


def test_a_scale_of_zero_is_still_a_fault(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", export_quant_cfg="int4", export_format="gptq")
    file = tmp_path / "out" / "model.safetensors"
    tensors, metadata = load_file(file), safe_open(file, "pt").metadata()
    name = next(name for name in tensors if name.endswith("scales"))
    tensors[name].view(-1)[3] = 0
    save_file(tensors, file, metadata=metadata)
    (problem,) = verify(tmp_path / "out", None).problems
    assert problem == f"{name}: holds a scale that is not positive"
