"""Inputs measured on transformers' own models: by hand, by hooks, and in the export."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.cli.console import ConsolePhases, console
from megatron_quant.dist import Groups
from megatron_quant.errors import CalibrationError, CheckpointError, ExportError
from megatron_quant.runs import file_inputs, file_to_file
from megatron_quant.runs.batches import calibration_batches
from megatron_quant.runs.file_to_file import Streamed
from megatron_quant.runs.file_to_file import stream_files as stream
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.streaming.observe import WeightInputAmax
from megatron_quant.weight_inputs import Watched
from tests.dist import checkpoints
from tests.dist.command import command
from tests.unit import hf_models, sources

UP = "model.layers.0.mlp.up_proj.weight"
LAYERS = {"qwen3_moe": "model.layers.0.mlp", "gemma4": "model.language_model.layers.0"}


def save(name: str, directory: Path) -> Path:
    save_it = checkpoints.save if name == "qwen3_moe" else hf_models.save
    return save_it(name, directory)


@pytest.fixture(scope="module", params=list(LAYERS))
def model(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory) -> Path:
    return hf_models.save("gemma4_text", tmp_path_factory.mktemp("gemma4"))


def options(source: Path, out: Path, **changes: object) -> QuantizeOptions:
    chosen = {"export_quant_cfg": "nvfp4", "calib_size": 4, "calib_seq_length": 32, **changes}
    chosen.setdefault("calib_dataset", __file__)
    return QuantizeOptions.from_flags(
        hf_model_id=str(source), export_dir=out, cold_experts="layer-max", **chosen
    )


def run(source: Path, out: Path, **changes: object) -> Streamed:
    return stream(options(source, out, **changes), Groups(), ConsolePhases(console()))


@contextmanager
def by_hand(model: nn.Module) -> Iterator[dict[str, float]]:
    """Largest inputs by module name, experts' as ``NAME.experts.E.gate_up`` and ``down``."""
    found: dict[str, float] = {}

    def see(name: str, x: torch.Tensor) -> None:
        if x.numel():
            found[name] = max(found.get(name, 0.0), x.abs().max().item())

    def linear(name: str):
        return lambda module, args: see(name, args[0])

    def experts(name: str):
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
            for e in range(module.num_experts):
                given = x[(chosen == e).any(-1)]
                gate, up = F.linear(given, module.gate_up_proj[e]).chunk(2, -1)
                see(f"{name}.{e}.gate_up", given)
                see(f"{name}.{e}.down", module.act_fn(gate) * up)

        return hook

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(linear(name)))
        if name.endswith(".experts"):
            hooks.append(module.register_forward_pre_hook(experts(name)))
    yield found
    for hook in hooks:
        hook.remove()


def test_amaxes_are_those_found_by_hand(model, tmp_path: Path) -> None:
    _, source = model
    streamed = run(source, tmp_path / "out", save_calibration=tmp_path / "kept.safetensors")
    reference = AutoModel.from_pretrained(
        source, dtype=torch.bfloat16, experts_implementation="eager"
    )
    with torch.no_grad(), by_hand(reference) as found:
        for batch in calibration_batches(options(source, tmp_path).calibration, source, 10**6):
            reference(input_ids=batch, use_cache=False)
    kept = load_file(tmp_path / "kept.safetensors")
    assert len(kept) > 20
    for key, amax in kept.items():
        module = key.removesuffix(".input_amax").removeprefix("model.")
        if ".experts." in module:
            at, _, leaf = module.rpartition(".")
            module = f"{at}.{'down' if leaf == 'down_proj' else 'gate_up'}"
        assert amax.item() == found[module], key
    experts = {k: v for k, v in found.items() if ".experts." in k}
    assert len(experts) + len(streamed.inputs.cold) == sum(
        1 for p in streamed.job.params if p.expert is not None
    )


def test_what_was_kept_gives_the_same_bytes(gemma4: Path, tmp_path: Path, monkeypatch) -> None:
    kept = tmp_path / "kept.safetensors"
    run(gemma4, tmp_path / "one", save_calibration=kept)
    monkeypatch.setattr(file_inputs, "check_tokens", None)  # no data is read
    other = run(gemma4, tmp_path / "two", load_calibration=kept, calib_dataset="none")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(other.inputs.cold) == len(other.inputs.scales) - len(other.inputs.found)


def test_the_export_has_the_scales_that_follow(model, tmp_path: Path) -> None:
    name, source = model
    out = tmp_path / "out"
    run(source, out, save_calibration=tmp_path / "kept.safetensors")
    kept = load_file(tmp_path / "kept.safetensors")
    stored = QuantizedCheckpoint(out)
    experts = f"{LAYERS[name]}.experts"
    down = [v.item() for k, v in kept.items() if k.startswith(experts) and "down_proj" in k]
    for expert in range(4):
        scale = stored.input_scale(f"{experts}.{expert}.down_proj")
        assert scale == pytest.approx(max(down) / (6 * 448), rel=1e-6)
    assert verify(out, source).problems == ()


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "deepseek_v3", "qwen3_5_moe"])
def test_other_models_are_measured_too(name: str, tmp_path: Path) -> None:
    source = hf_models.save(name, tmp_path / "source")
    streamed = run(source, tmp_path / "out", export_quant_cfg="fp8")
    measured = {p.name for p in streamed.job.params} & streamed.inputs.found.keys()
    assert len(measured) + len(streamed.inputs.cold) == len(streamed.job.quant.quantized)


def test_the_model_is_left_as_it_was() -> None:
    w_EKN = torch.randn(3, 4, 6)
    x_ETK = torch.randn(3, 5, 4)
    x_ETK[1] = 0
    with WeightInputAmax([Watched(w_EKN, ("a", "b", "c"))]) as mode:
        torch.bmm(x_ETK, w_EKN)
        x_ETK[2] @ w_EKN[torch.tensor(0)]
        F.linear(torch.full((2, 6), 9.0), w_EKN[2, :, :])
        F.linear(torch.zeros(0, 6), w_EKN[1])
    largest = max(x_ETK[0].abs().max(), x_ETK[2].abs().max())
    assert mode.found.amax == {"a": largest, "b": torch.tensor(0.0), "c": torch.tensor(9.0)}
    assert mode.found.tokens == {"a": 10, "b": 0, "c": 7}


def test_cold_experts_stop_the_run(gemma4: Path, tmp_path: Path) -> None:
    few = options(gemma4, tmp_path / "out", calib_size=1, calib_seq_length=1)
    strict = replace(few, calibration=replace(few.calibration, cold_experts="error"))
    with pytest.raises(CalibrationError, match=r"expert \d of model.layers.\d.experts saw no"):
        stream(strict, Groups(), ConsolePhases(console()))
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_is_needed_for_data_alone(gemma4: Path, tmp_path: Path) -> None:
    source = shutil.copytree(gemma4, tmp_path / "source")
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="or quantize with --weight-only"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", weight_only=True)


def test_the_command_reports_what_was_measured(gemma4: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    flags = {
        "hf-model-id": gemma4,
        "export-quant-cfg": "nvfp4_experts_only",
        "calib-size": 1,
        "calib-seq-length": 1,
        "calib-dataset": __file__,
        "cold-experts": "layer-max",
        "export-dir": tmp_path / "out",
        "report": report,
    }
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    ended = command("quantize", "--stream", *argv)
    assert (ended.status, ended.err) == (0, "")
    assert "expert weights saw no token and took" in ended.out and "verified: 65" in ended.out
    found = json.loads(report.read_text())
    assert len(found["cold_experts"]) == 8 and len(found["input_amax"]) == 8


def test_a_layer_that_is_given_zeros_alone_has_scale_one(tmp_path: Path) -> None:
    source = checkpoints.save("qwen3", tmp_path / "source")
    sources.edit(source, lambda t: t | {UP: torch.zeros_like(t[UP])})
    run(source, tmp_path / "out", export_format="compressed-tensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.input_global_scale"].item() == 1
    assert stored["model.layers.1.mlp.down_proj.input_global_scale"].item() != 1


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("none/kept.safetensors", "which is no directory"),
        ("notes.txt/kept.safetensors", "which is no directory"),
        ("folder", "is a directory"),
        ("out/model.safetensors", "lies in, --export-dir, --megatron-save-path or"),
        ("source/model.safetensors", "lies in, --export-dir, --megatron-save-path or"),
        ("out", "lies in, --export-dir, --megatron-save-path or"),
    ],
)
def test_a_file_that_could_not_be_written_is_refused_before_the_work(
    place: str, words: str, gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "source").symlink_to(gemma4)
    monkeypatch.setattr(file_to_file, "calibration_text", None)  # no work is done
    with pytest.raises(ExportError, match=words):
        run(gemma4, tmp_path / "out", save_calibration=tmp_path / place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "notes.txt", "source"]
