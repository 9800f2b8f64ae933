"""The FP8 KV cache: its calibration, its effect in a forward, and its scales in files."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_quant.errors import CalibrationError, CoverageError
from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_gptq import run
from tests.dist.test_layouts import digests, export_all, tensors
from tests.dist.test_stream import stream_case

LAYERS, BATCHES = 2, 4
# (ranks, tp, ep, etp)
LAYOUTS = [(1, 1, 1, 1), (2, 1, 2, 1), (4, 2, 2, 1)]
SLOTS = [f"model.layers.{i}.self_attn.{p}" for i in range(LAYERS) for p in "kv"]
NAMES = {
    "modelopt": [f"model.layers.{i}.self_attn.{p}_proj.{p}_scale" for i in range(2) for p in "kv"],
    "compressed-tensors": [f"model.layers.{i}.self_attn.{p}_scale" for i in range(2) for p in "kv"],
}
SHAPES = {"modelopt": (), "compressed-tensors": (1,)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


def calibrated(
    path: Path, tp: int, ep: int, recipe: str, kv_cache: str, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, float]]:
    """What calibration reports of the cache, and what this rank's quantizers hold."""
    from dataclasses import replace

    from megatron_quant.calib.calibration import calibrate
    from megatron_quant.calib.kv_cache import calibrate_kv_cache, run_rest, watch
    from megatron_quant.layers.kv_cache import attach_kv_cache
    from tests.dist import live

    model = live.load(path, live.Parallelism(tp, ep), dtype)
    attached = live.with_quantizers(model, recipe)
    plan = replace(attached.plan, kv_cache=kv_cache)
    cached = attach_kv_cache(model.module, plan, [p.weight for p in model.local])
    steps = iter(attached.forwards(live.batches(BATCHES)) if kv_cache == "fp8" else [])
    with watch(cached) as seen:
        calibrate(attached.layers, plan, model.groups, steps)
        run_rest(attached.layers, steps)
    merged = calibrate_kv_cache(cached, plan, model.groups, seen)
    assert all(tensor.quantizer.is_enabled for tensor in cached)
    return merged, {tensor.slot.name: tensor.amax().item() for tensor in cached}


def reference(path: Path) -> dict[str, float]:
    """Amax of transformers' own cache, keys rotated, over the same tokens."""
    from tests.dist import live

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = dict.fromkeys(SLOTS, 0.0)
    for ids in live.batches(BATCHES):
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        for i, layer in enumerate(cache.layers):
            for part, tensor in (("k", layer.keys), ("v", layer.values)):
                name = f"model.layers.{i}.self_attn.{part}"
                found[name] = max(found[name], tensor.abs().max().item())
    return found


@pytest.fixture(scope="module")
def expected(checkpoint: Path, ranks: Ranks) -> dict[str, float]:
    (found,) = ranks(1, reference, checkpoint)
    return found


@pytest.mark.parametrize("recipe", ["fp8", "int4"])  # with data for the linears, and without
def test_amaxes_are_those_of_transformers_cache(
    recipe: str, checkpoint: Path, expected: dict[str, float], ranks: Ranks
) -> None:
    for world, tp, ep in ((1, 1, 1), (2, 2, 1), (4, 2, 2)):
        for merged, held in ranks(
            world, calibrated, checkpoint, tp, ep, recipe, "fp8", torch.float32
        ):
            assert merged == held
            assert merged == pytest.approx(expected, rel=1e-4)


def test_a_cast_needs_no_data(checkpoint: Path, ranks: Ranks) -> None:
    for merged, held in ranks(2, calibrated, checkpoint, 2, 1, "int4", "fp8_cast", torch.bfloat16):
        assert merged == {}
        assert held == dict.fromkeys(SLOTS, 448.0)


def forwards(path: Path) -> None:
    """With the cache quantized, quantized by hand, and with all off."""
    from dataclasses import replace

    from megatron_quant.calib.observe import unquantized
    from megatron_quant.formats import fake_quant, get_format
    from megatron_quant.layers.kv_cache import attach_kv_cache
    from megatron_quant.mcore.model.schedule import full_logits
    from tests.dist import live

    model = live.load(path, dtype=torch.float32)
    (ids,) = live.batches(1)
    with torch.no_grad():
        plain = full_logits(model.module, ids, 258)
    attached = live.with_quantizers(model, "int4")
    plan = replace(attached.plan, kv_cache="fp8_cast")
    cached = attach_kv_cache(model.module, plan, [p.weight for p in model.local])
    amaxes = [0.5 + i for i in range(len(cached))]
    for tensor, amax in zip(cached, amaxes, strict=True):
        tensor.set_amax(amax)
    with torch.no_grad(), unquantized(attached.layers):
        quantized = full_logits(model.module, ids, 258)
        with unquantized(cached):
            # Experts weigh their outputs where they weighed activations: that rounds otherwise.
            torch.testing.assert_close(full_logits(model.module, ids, 258), plain)
            hooks = [
                tensor.quantizer.register_forward_hook(
                    lambda module, args, out, amax=amax: fake_quant(
                        args[0], get_format("fp8"), torch.tensor(amax / 448)
                    )
                )
                for tensor, amax in zip(cached, amaxes, strict=True)
            ]
            by_hand = full_logits(model.module, ids, 258)
            for hook in hooks:
                hook.remove()
    assert torch.equal(quantized, by_hand)
    assert not torch.equal(quantized, plain)


def test_a_forward_sees_the_quantized_cache(checkpoint: Path, ranks: Ranks) -> None:
    ranks(1, forwards, checkpoint)


@pytest.mark.parametrize("dialect", list(NAMES))
def test_files_hold_the_scales(dialect: str, checkpoint: Path, tmp_path: Path, ranks) -> None:
    case = {
        "export_quant_cfg": "int4" if dialect == "compressed-tensors" else "nvfp4",
        "export_format": dialect,
        "export_kv_cache_quant": "fp8",
        "cold_experts": "layer-max",
    }
    found = []
    for world, tp, ep, etp in LAYOUTS:
        out = tmp_path / f"{world}-{tp}-{ep}"
        ranks(world, export_all, checkpoint, out, tp, ep, etp, [case])
        (directory,) = out.iterdir()
        held = {n: t for n, t in tensors(directory).items() if n.endswith(("k_scale", "v_scale"))}
        assert sorted(held) == sorted(NAMES[dialect])
        assert {(t.dtype, tuple(t.shape)) for t in held.values()} == {
            (torch.float32, SHAPES[dialect])
        }
        found.append({name: t.item() for name, t in held.items()})
    for other in found[1:]:  # from a bf16 forward, whose last bits depend on the layout
        assert other == pytest.approx(found[0], rel=0.02)


@pytest.mark.parametrize("dialect", list(NAMES))
def test_cast_exports_are_byte_equal_at_every_layout(
    dialect: str, checkpoint: Path, tmp_path: Path, ranks
) -> None:
    case = {
        "export_quant_cfg": "w4a16_nvfp4",
        "export_format": dialect,
        "export_kv_cache_quant": "fp8_cast",
    }
    files = []
    for world, tp, ep, etp in LAYOUTS:
        out = tmp_path / f"{world}-{tp}-{ep}"
        ranks(world, export_all, checkpoint, out, tp, ep, etp, [case])
        (directory,) = out.iterdir()
        files.append(digests(directory))
    assert all(other == files[0] for other in files[1:])
    held = tensors(directory)
    assert [held[name].item() for name in NAMES[dialect]] == [1.0] * 4
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8


def test_one_calibration_gives_a_stream_and_live_models_the_same_bytes(
    checkpoint: Path, tmp_path: Path, ranks: Ranks
) -> None:
    kept = tmp_path / "kept.safetensors"
    case = {"export_quant_cfg": "nvfp4", "export_kv_cache_quant": "fp8"}
    cold = {"cold_experts": "layer-max"}
    text = {"calib_dataset": __file__, "calib_size": 4, "calib_seq_length": 32}
    first, saved = tmp_path / "first", {**case, **cold, **text, "save_calibration": kept}
    ranks(2, stream_case, checkpoint, first, saved)
    assert sorted(n for n in tensors(first) if n.endswith(("k_scale", "v_scale"))) == sorted(
        NAMES["modelopt"]
    )
    loaded = {**case, "load_calibration": kept}
    ranks(3, stream_case, checkpoint, tmp_path / "streamed", {**loaded, **cold})
    assert digests(first) == digests(tmp_path / "streamed")
    for world, tp, ep, etp in LAYOUTS[::2]:
        out = tmp_path / f"{world}"
        layout = {"tp": tp, "ep": ep, "etp": etp}
        ranks(world, run, checkpoint, layout, [{**loaded, "export_dir": out}])
        assert digests(out) == digests(first)


def reexported(source: Path, out: Path) -> None:
    from megatron_quant.runs.conversion import ExportOptions, reexport
    from megatron_quant.cli.console import ConsolePhases, console
    from megatron_quant.mcore.model.parallel import start_distributed

    options = ExportOptions(source=source, export_dir=out, export_format="compressed-tensors")
    reexport(options, start_distributed(), ConsolePhases(console()))


def test_another_dialect_keeps_the_scales(checkpoint: Path, tmp_path: Path, ranks: Ranks) -> None:
    case = {
        "export_quant_cfg": "w4a16_nvfp4",
        "export_format": "modelopt",
        "export_kv_cache_quant": "fp8",
    }
    ranks(2, export_all, checkpoint, tmp_path / "first", 2, 1, 1, [case])
    (first,) = (tmp_path / "first").iterdir()
    ranks(2, reexported, first, tmp_path / "second")
    here, there = tensors(first), tensors(tmp_path / "second")
    for old, new in zip(NAMES["modelopt"], NAMES["compressed-tensors"], strict=True):
        assert here[old].item() == there[new].item()


def changed(path: Path, out: Path, name: str, value: float) -> Path:
    """The checkpoint with every element of one weight set to ``value``."""
    out.mkdir()
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "model.safetensors")
    weights[name] = torch.full_like(weights[name], value)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def test_values_that_are_all_zero(checkpoint: Path, tmp_path: Path, ranks: Ranks) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    path = changed(checkpoint, tmp_path / "zero", name, 0.0)
    for error in ranks.errors(2, calibrated, path, 2, 1, "int4", "fp8", torch.bfloat16):
        assert isinstance(error, CalibrationError)
        assert "layers.1.self_attn.v of the KV cache is zero for all" in str(error)
        assert "--export-kv-cache-quant fp8_cast" in str(error)


def observed_nothing(path: Path, value: float | None) -> None:
    from dataclasses import replace

    from megatron_quant.calib.kv_cache import calibrate_kv_cache
    from megatron_quant.calib.observe import InputAmax
    from tests.dist import live

    model = live.load(path)
    plan = replace(live.with_quantizers(model, "int4").plan, kv_cache="fp8")
    seen = {}
    if value is not None:
        seen = {name: InputAmax() for name in SLOTS}
        for stat in seen.values():
            stat(None, (torch.tensor([value]),))
    calibrate_kv_cache([], plan, model.groups, seen)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "no calibration token reached model.layers.0.self_attn.k of the KV cache"),
        (float("nan"), "layers.0.self_attn.k of the KV cache contains NaN or Inf"),
    ],
)
def test_statistics_that_are_missing_or_not_finite(
    value: float | None, message: str, checkpoint: Path, ranks: Ranks
) -> None:
    (error,) = ranks.errors(1, observed_nothing, checkpoint, value)
    assert isinstance(error, CalibrationError)
    assert message in str(error)


def without_attention_quantizers(path: Path) -> None:
    from dataclasses import replace

    from megatron_quant.layers.kv_cache import attach_kv_cache
    from tests.dist import live

    model = live.load(path)
    plan = replace(live.with_quantizers(model, "int4").plan, kv_cache="fp8")
    model.module.decoder.layers[0].self_attention.core_attention = torch.nn.Identity()
    attach_kv_cache(model.module, plan, [p.weight for p in model.local])


def test_attention_without_quantizers(checkpoint: Path, ranks: Ranks) -> None:
    (error,) = ranks.errors(1, without_attention_quantizers, checkpoint)
    assert isinstance(error, CoverageError)
    assert "core_attention is a Identity, which has no quantizer of its k cache" in str(error)
