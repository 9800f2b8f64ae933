"""Squares and products of inputs that a stream measures, keeps and quantizes by."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModel

from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.errors import CalibrationError, CheckpointError
from megatron_quant.formats import fake_quant, get_format, tensor_scale
from megatron_quant.rounding import factored
from megatron_quant.runs.batches import calibration_batches
from megatron_quant.streaming import factors, part_split, stages, walk
from tests.dist import checkpoints, packed
from tests.unit import hf_models
from tests.unit.test_stream_inputs import options, run
from tests.unit.test_stream_layers import contents

GPTQ: dict[str, Any] = {
    "export_quant_cfg": "nvfp4",
    "algorithm": "gptq",
    "calib_size": 6,
    "calib_batch_size": 1,
    "keep_hessians": True,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def measured(source: Path, tmp_path_factory) -> Path:
    """A folder with an export and what was kept."""
    folder = tmp_path_factory.mktemp("measured")
    run(source, folder / "out", save_calibration=folder / "kept.safetensors", **GPTQ)
    return folder


def by_hand(source: Path) -> dict[str, torch.Tensor]:
    """Products of inputs by module, from hooks on the whole model."""
    model = AutoModel.from_pretrained(source, dtype=torch.bfloat16, experts_implementation="eager")
    found: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        wide = x.reshape(-1, x.shape[-1]).double()
        found[name] = found.get(name, 0) + wide.T @ wide

    def experts(name: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
            for e in range(module.num_experts):
                given = x[(chosen == e).any(-1)]
                gate, up = F.linear(given, module.gate_up_proj[e]).chunk(2, -1)
                add(f"model.{name}.{e}.gate_proj", given)
                add(f"model.{name}.{e}.down_proj", module.act_fn(gate) * up)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, n=name: add(f"model.{n}", args[0]))
        if name.endswith(".experts"):
            module.register_forward_pre_hook(experts(name))
    chosen = options(source, source, **GPTQ, save_calibration=source / "x").calibration
    with torch.no_grad():
        for batch in calibration_batches(chosen, source, 1 << 20):
            model(input_ids=batch, use_cache=False)
    return found


def test_products_are_those_of_hooks(source: Path, measured: Path) -> None:
    kept, hand = load_file(measured / "kept.safetensors"), by_hand(source)
    moments = {k.removesuffix(".input_moment"): v for k, v in kept.items() if "moment" in k}
    assert len(moments) > 10
    reached = [name for name in moments if hand[name].any()]
    for name in reached:
        error = (moments[name].double() - hand[name]).norm() / hand[name].norm()
        assert error < 1e-5, name
        assert torch.equal(kept[f"{name}.input_squares"], moments[name].diagonal())
    for name in moments.keys() - set(reached):  # a cold expert has its whole layer's
        leaf = name.rpartition(".")[2]
        layer = [n for n in hand if n.startswith(name.split("experts.")[0]) and n.endswith(leaf)]
        pooled = sum(hand[n] for n in layer)
        assert (moments[name].double() - pooled).norm() < 1e-5 * pooled.norm()


def test_what_codes_of_inputs_lose(source: Path, measured: Path) -> None:
    """Inputs are coded by the scale that the export has for them."""
    kept, found = load_file(measured / "kept.safetensors"), {}
    model = AutoModel.from_pretrained(source, dtype=torch.bfloat16, experts_implementation="eager")
    nvfp4 = get_format("nvfp4")

    def add(name: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            y = fake_quant(x, nvfp4, tensor_scale(kept[f"{name}.input_amax"], nvfp4))
            found[name] = found.get(name, 0) + (x - y).double().T @ y.double()

        return hook

    for name in ("layers.0.self_attn.o_proj", "layers.1.self_attn.q_proj"):
        model.get_submodule(name).register_forward_pre_hook(add(f"model.{name}"))
    chosen = options(source, source, **GPTQ, save_calibration=source / "x").calibration
    with torch.no_grad():
        for batch in calibration_batches(chosen, source, 1 << 20):
            model(input_ids=batch, use_cache=False)
    for name, want in found.items():
        error = (kept[f"{name}.input_lost_nvfp4"].double() - want).norm() / want.norm()
        assert error < 1e-4, name
    export = load_file(measured / "out" / "model.safetensors")
    stated = export["model.layers.0.self_attn.o_proj.input_scale"]
    amax = kept["model.layers.0.self_attn.o_proj.input_amax"]
    torch.testing.assert_close(stated, tensor_scale(amax, nvfp4))


def test_what_was_kept_gives_the_same_bytes(source: Path, measured: Path, tmp_path: Path) -> None:
    flags = {"export_quant_cfg": "nvfp4", "algorithm": "gptq", "calib_dataset": "none"}
    run(source, tmp_path / "out", load_calibration=measured / "kept.safetensors", **flags)
    assert contents(tmp_path / "out") == contents(measured / "out")
    assert verify(tmp_path / "out", source).problems == ()


def ranks_run(source: Path, folder: Path, **flags: Any) -> None:
    run(source, folder / "out", save_calibration=folder / "kept.safetensors", **(flags or GPTQ))


def test_ranks_share_the_sums(source: Path, measured: Path, tmp_path: Path, ranks) -> None:
    ranks(3, ranks_run, source, tmp_path)
    one, more = (load_file(f / "kept.safetensors") for f in (measured, tmp_path))
    assert one.keys() == more.keys()
    for name, value in one.items():
        error = (more[name].double() - value.double()).norm() / value.double().norm()
        assert error < 1e-5, name


def killed(source: Path, folder: Path, layer: int, batch: int, **flags: Any) -> None:
    run_layer, left = stages.Call.run, layer * 6 + batch

    def dies(*args: Any) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return run_layer(*args)

    stages.Call.run = dies
    ranks_run(source, folder, **flags)


def resumed(source: Path, folder: Path, **flags: Any) -> None:
    ranks_run(source, folder, resume=True, **(flags or GPTQ))


@pytest.mark.parametrize(("layer", "batch"), [(1, 2), (2, 3), (3, 0), (3, 5)])
def test_a_killed_walk_goes_on_to_the_same_bytes(
    layer: int, batch: int, source: Path, measured: Path, tmp_path: Path, ranks
) -> None:
    """Two layers are walked through for the scales of inputs, and again for the sums."""
    died = ranks.errors(1, killed, source, tmp_path, layer, batch, timeout=60)
    assert str(died[0]) == "the process died"
    assert (tmp_path / "out.calibration" / "rank-0.sums.safetensors").exists() == (layer > 1)
    ranks(1, resumed, source, tmp_path)
    assert contents(tmp_path) == contents(measured)


def test_spoiled_sums_are_made_again(source: Path, measured: Path, tmp_path: Path, ranks) -> None:
    ranks.errors(1, killed, source, tmp_path, 3, 0, timeout=60)
    sums = tmp_path / "out.calibration" / "rank-0.sums.safetensors"
    name = "decoder.layers.0.mlp.experts.linear_fc2.weight3.moment"
    whole = sums.read_bytes()
    at = whole.index(load_file(sums)[name].numpy().tobytes())
    sums.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    ranks(1, resumed, source, tmp_path)
    assert contents(tmp_path) == contents(measured)


def test_a_second_moment_is_factored_once(
    source: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the parts that its weight is cut into; q, k and v share one, and gate and up."""
    found: list[str] = []

    def counted(moment: torch.Tensor, fmt: Any, how: Any) -> Any:
        found.extend(how.names)
        return factored(moment, fmt, how)

    monkeypatch.setattr(factors, "factored", counted)
    monkeypatch.setattr(part_split, "_ELEMENTS", 1 << 14)
    flags = {"export_quant_cfg": "nvfp4", "algorithm": "gptq"}
    run(source, tmp_path / "out", load_calibration=measured / "kept.safetensors", **flags)
    assert contents(tmp_path / "out") == contents(measured / "out")
    assert len(found) == 2 * (2 + 2 * 8) == len(set(found))


def test_scales_that_are_kept_leave_nothing_to_round(tmp_path: Path) -> None:
    said = r"the recipe searches its scales \(gptq\), which does not go with --keep-scales"
    source = packed.save(tmp_path)[0]
    with pytest.raises(CheckpointError, match=said):
        run(source, tmp_path / "out", keep_scales=True, **{**GPTQ, "keep_hessians": False})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gemma4", "gpt_oss", "llama4", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("algorithm", ["imatrix", "gptq"])
def test_other_models(name: str, algorithm: str, tmp_path: Path) -> None:
    """The export verifies, has other codes than without data, and its sums can be kept."""
    source = hf_models.save(name, tmp_path / "source")
    kept = tmp_path / "kept.safetensors"
    flags = {"export_quant_cfg": "w4a16_nvfp4", "calib_size": 16}
    run(source, tmp_path / "out", algorithm=algorithm, save_calibration=kept, **flags)
    assert verify(tmp_path / "out", source).problems == ()
    assert "input_squares" in "".join(load_file(kept))
    run(source, tmp_path / "max", algorithm="max", **flags)
    ours, theirs = (contents(tmp_path / n)["model.safetensors"] for n in ("out", "max"))
    assert ours != theirs


def overflowing(source: Path, directory: Path) -> Path:
    """The checkpoint with inputs of an expert that are finite, and squares that are not."""
    shutil.copytree(source, directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for expert in range(8):
        tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"] *= 1e24
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("algorithm", ["imatrix", "gptq"])
def test_sums_that_are_not_finite_are_named(algorithm: str, source: Path, tmp_path: Path) -> None:
    large = overflowing(source, tmp_path / "source")
    said = r"inputs of decoder\.layers\.1\.mlp\.experts\.linear_fc2\.weight\d (is|are) not finite"
    with pytest.raises(CalibrationError, match=said):
        run(large, tmp_path / "out", **{**GPTQ, "algorithm": algorithm, "keep_hessians": False})
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_without_products_is_refused(source: Path, measured: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    imatrix = {**GPTQ, "algorithm": "imatrix", "keep_hessians": False}
    run(source, tmp_path / "out", save_calibration=kept, **imatrix)
    flags = {"export_quant_cfg": "nvfp4", "algorithm": "gptq"}
    with pytest.raises(CalibrationError, match=r"has no .*input_moment: save one with --keep-hes"):
        run(source, tmp_path / "other", load_calibration=kept, **flags)
    assert not (tmp_path / "other").exists()
    whole = load_file(measured / "kept.safetensors")
    save_file({name: t for name, t in whole.items() if "input_lost" not in name}, kept)
    with pytest.raises(CalibrationError, match=r"has no .*input_lost_nvfp4: save one with --keep"):
        run(source, tmp_path / "other", load_calibration=kept, **flags)
    assert not (tmp_path / "other").exists()


def test_a_model_that_is_loaded_whole_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(self: Any) -> None:
        raise stages.CannotWalk("so it is")

    monkeypatch.setattr(walk.Walk, "run", cannot)
    with pytest.raises(CalibrationError, match="smoothquant measure layer by layer, which this"):
        run(source, tmp_path / "out", **{**GPTQ, "keep_hessians": False})
    assert not any(tmp_path.iterdir())
