"""State that the installed release of ModelOpt saves itself is read."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import checkpoints, saved
from tests.dist.command import command, quantize_argv
from tests.dist.pool import Ranks

SIZES = {"num_hidden_layers": 1, "num_experts": 4}
EXPERTS = "decoder.layers.0.mlp.experts.experts"
APART = tuple(map(int, version("nvidia-modelopt").split(".")[:2])) >= (0, 47)


def of_modelopt(source: Path) -> tuple[Any, dict[str, Any]]:
    """One rank's model with ModelOpt's own classes, calibrated by its verbs, and its state."""
    import modelopt.torch.quantization as mtq
    from megatron.core import parallel_state as mpu
    from modelopt.torch.quantization.nn import QuantModule

    from megatron_quant.ckpt.plan.ranks import Layout
    from megatron_quant.ckpt.storage.hub import read_config
    from megatron_quant.mcore.model.build import build_model
    from megatron_quant.mcore.model.parallel import start_megatron
    from megatron_quant.mcore.model.schedule import forward
    from megatron_quant.models import lookup

    hf_config = read_config(source)
    layout = Layout.simulate(1, 1, 1, 1, 4)
    start_megatron(layout)
    (model,) = build_model(lookup(hf_config), hf_config, layout, torch.bfloat16)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=0.05) if parameter.dim() > 1 else parameter.data.fill_(1)
        if name.endswith("weight2"):
            parameter.data.mul_(3)
    ids = torch.arange(64).view(2, 32)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: forward(m, ids))
    linear = model.decoder.layers[0].mlp.experts.linear_fc1
    assert isinstance(linear, QuantModule)
    assert not any("megatron_quant" in kind.__module__ for kind in type(linear).__mro__)
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    return model, model.sharded_state_dict(metadata=metadata)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


@pytest.fixture(scope="module")
def stored(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    out = tmp_path_factory.mktemp("modelopt") / "theirs"
    ranks(1, saved_by_modelopt, source, out)
    return out


def saved_by_modelopt(source: Path, out: Path) -> None:
    from megatron.core import dist_checkpointing

    out.mkdir()
    dist_checkpointing.save(of_modelopt(source)[1], str(out))


def read_by_modelopt(source: Path, stored: Path) -> tuple[set[str], set[str], list[float]]:
    """Keys that ModelOpt's model misses in ours and that it has not, and an expert's amaxes."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    model, state = of_modelopt(source)
    state = {name: value for name, value in state.items() if "_extra_state" not in name}
    loaded, missing, unexpected = dist_checkpointing.load(
        state, str(stored), strict=StrictHandling.RETURN_ALL
    )
    model.load_state_dict(loaded, strict=False)
    quantizer = model.decoder.layers[0].mlp.experts.linear_fc1.weight_quantizer
    amaxes = [quantizer[i].amax for i in range(4)] if APART else [quantizer.amax]
    return missing, unexpected, [amax.item() for amax in amaxes]


def test_tensors_are_read_at_another_layout(
    source: Path, stored: Path, tmp_path: Path, ranks: Ranks
) -> None:
    flags = {"export_quant_cfg": "fp8", "weight_only": None}
    flags |= {"megatron_load_path": stored, "megatron_save_path": tmp_path / "ours"}
    for ended in ranks(4, command, *quantize_argv(source, tmp_path / "out", **flags)):
        assert ended.status == 0, ended.err
    theirs, ours = (quantizers(path) for path in (stored, tmp_path / "ours"))
    for linear in ("linear_fc1", "linear_fc2"):
        name = f"{linear}.weight_quantizer._amax"
        if APART:
            assert len({theirs[f"{EXPERTS}.{expert}.{name}"].item() for expert in range(4)}) > 1
    assert len(theirs) == (14 if APART else 8) and theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def quantizers(path: Path) -> dict[str, torch.Tensor]:
    return {k: t for k, t in saved.tensors(path).items() if "_quantizer." in k}


def test_modelopts_model_takes_ours(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    """At one rank, where its own state can be saved and loaded."""
    scales = "per_expert" if APART else "shared"
    flags = {"export_quant_cfg": "fp8", "weight_only": None, "cold_experts": "layer-max"}
    flags |= {"export_dir": None, "expert_scales": scales, "calib_size": 4}
    argv = quantize_argv(source, tmp_path, **flags, megatron_save_path=tmp_path / "ours")
    for ended in ranks(2, command, *argv):
        assert ended.status == 0, ended.err
    ((missing, unexpected, amaxes),) = ranks(1, read_by_modelopt, source, tmp_path / "ours")
    assert (missing, unexpected) == ({"megatron_quant.description"}, set())
    ours = quantizers(tmp_path / "ours")
    keys = [f"{EXPERTS}.{e}.linear_fc1" for e in range(4)] if APART else [f"{EXPERTS}.linear_fc1"]
    assert amaxes == [ours[f"{key}.weight_quantizer._amax"].item() for key in keys]


def test_without_the_recipe(source: Path, stored: Path, tmp_path: Path, ranks: Ranks) -> None:
    argv = ["export", "--megatron-load-path", str(stored), "--hf-model-id"]
    argv += [str(source), "--export-dir", str(tmp_path / "out"), "--export-format", "modelopt"]
    (ended,) = ranks(1, command, *argv)
    assert ended.status == 1
    assert "does not say how it is quantized" in ended.err and "--export-quant-cfg" in ended.err

