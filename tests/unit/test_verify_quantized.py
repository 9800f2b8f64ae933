import pytest
import torch

from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.errors import CheckpointError
from megatron_quant.formats import decode, encode, tensor_scale
from megatron_quant.models import Box
from tests.unit import exported
from tests.unit.exported import INPUT_AMAX, WRITTEN

DOWN = "model.layers.0.mlp.experts.1.down_proj"
OUT = "model.layers.0.self_attn.o_proj"


@pytest.fixture
def nvfp4(tmp_path, weights):
    return exported.export(tmp_path, "modelopt", exported.plan("nvfp4"), weights)


@pytest.mark.parametrize(("dialect", "choice"), WRITTEN)
def test_decodes_what_was_exported(tmp_path, weights, dialect, choice):
    quant = exported.written_plan(dialect, choice)
    checkpoint = QuantizedCheckpoint(exported.export(tmp_path, dialect, quant, weights))
    assert sorted(checkpoint) == sorted(weights)
    linears = {m for d in quant.quantized for m in d.slot.sources}
    assert checkpoint.modules == dict.fromkeys(linears, exported.read_format(dialect, choice))
    fmt, _ = exported.formats(choice)
    for name, w in weights.items():
        decoded = checkpoint.weight(name, torch.float32)
        if name.removesuffix(".weight") not in linears:
            assert torch.equal(decoded, w.float())
        elif fmt.tensor_scale:  # shared with what the weight is fused with
            assert (w.float() - decoded).norm() < 0.15 * w.float().norm()
        else:
            assert torch.equal(decoded, decode(encode(w, fmt, None), fmt, torch.float32))
        assert torch.equal(checkpoint.weight(name, torch.bfloat16), decoded.bfloat16())


@pytest.mark.parametrize(("dialect", "choice"), WRITTEN)
def test_input_scales(tmp_path, weights, dialect, choice):
    quant = exported.written_plan(dialect, choice)
    checkpoint = QuantizedCheckpoint(exported.export(tmp_path, dialect, quant, weights))
    _, inputs = exported.formats(choice)
    scale = checkpoint.input_scale(OUT)
    if inputs is None or not inputs.tensor_scale:
        assert scale is None
    else:
        assert scale == pytest.approx(tensor_scale(INPUT_AMAX, inputs).item(), rel=2**-23)
    assert checkpoint.input_scale("lm_head") is None


def test_dialects_decode_the_same(tmp_path, weights):
    """The divisors of compressed-tensors cost at most the rounding of a reciprocal."""
    both = [
        QuantizedCheckpoint(exported.export(tmp_path / d, d, exported.plan("nvfp4"), weights))
        for d in ("modelopt", "compressed-tensors")
    ]
    ours, theirs = (c.weight(f"{DOWN}.weight", torch.float32) for c in both)
    torch.testing.assert_close(ours, theirs, rtol=2**-22, atol=0)


def test_plain_checkpoint(tmp_path, weights):
    checkpoint = QuantizedCheckpoint(exported.write(tmp_path, weights))
    assert checkpoint.dialect is None and checkpoint.modules == {}
    assert sorted(checkpoint) == sorted(weights)
    for name, w in weights.items():
        assert torch.equal(checkpoint.weight(name, torch.bfloat16), w)


def test_missing_directory(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        QuantizedCheckpoint(tmp_path / "nowhere")


def test_unknown_method(nvfp4):
    exported.edit_json(
        nvfp4 / "config.json", lambda c: c["quantization_config"].update(quant_method="hqq")
    )
    with pytest.raises(CheckpointError, match=r"'hqq'.*known: modelopt, compressed-tensors, gptq"):
        QuantizedCheckpoint(nvfp4)


def test_missing_tensor(nvfp4):
    exported.edit(nvfp4, lambda t: t.pop(f"{DOWN}.weight_scale"))
    with pytest.raises(CheckpointError, match=f"no tensor {DOWN}.weight_scale"):
        QuantizedCheckpoint(nvfp4).weight(f"{DOWN}.weight", torch.bfloat16)


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("weight_scale", lambda t: t[:, :-1]),
        ("weight_scale", torch.Tensor.float),
        ("weight_scale_2", lambda t: t.repeat(2)),
        ("weight", torch.Tensor.float),
    ],
)
def test_malformed_tensor(nvfp4, suffix, change):
    name = f"{DOWN}.{suffix}"
    exported.edit(nvfp4, lambda t: t.update({name: change(t[name])}))
    with pytest.raises(CheckpointError, match=f"{name} is .* but the config means"):
        QuantizedCheckpoint(nvfp4).weight(f"{DOWN}.weight", torch.bfloat16)


def test_factors_on_inputs_multiply_columns(nvfp4):
    """pre_quant_scale of ModelOpt: the weight, slices of it and its error; no other dialect."""
    name, checkpoint = f"{DOWN}.pre_quant_scale", QuantizedCheckpoint(nvfp4)
    plain = checkpoint.weight(f"{DOWN}.weight", torch.float32)
    scale = torch.linspace(0.5, 2, plain.shape[1])
    exported.edit(nvfp4, lambda t: t.update({name: scale}))
    scaled = QuantizedCheckpoint(nvfp4)
    assert torch.equal(scaled.weight(f"{DOWN}.weight", torch.float32), plain * scale)
    box = Box((3, 17), (5, 40))
    assert torch.equal(scaled.read(f"{DOWN}.weight", box), (plain * scale)[box.index])
    assert scaled.packed(DOWN).lost(plain * scale, Box((0, 0), tuple(plain.shape)))[1] == 0
    assert set(scaled.dense()) == set(checkpoint.dense())
    assert verify(nvfp4).problems == ()
    with pytest.raises(CheckpointError, match=f"{name} multiplies the module's inputs, which no"):
        scaled.fields(DOWN)


@pytest.mark.parametrize(
    "value", [torch.ones(127), torch.ones(128).int(), torch.full((128,), torch.nan)]
)
def test_factors_that_are_none(nvfp4, value):
    exported.edit(nvfp4, lambda t: t.update({f"{DOWN}.pre_quant_scale": value}))
    with pytest.raises(CheckpointError, match=f"{DOWN}.pre_quant_scale is .*, not 128 finite fac"):
        QuantizedCheckpoint(nvfp4).weight(f"{DOWN}.weight", torch.bfloat16)


def test_plain_name_of_packed_bytes_is_refused(nvfp4):
    exported.edit_json(
        nvfp4 / "config.json", lambda c: c["quantization_config"]["ignore"].append(DOWN)
    )
    with pytest.raises(CheckpointError, match=f"{DOWN}.weight is torch.uint8"):
        QuantizedCheckpoint(nvfp4).weight(f"{DOWN}.weight", torch.bfloat16)
