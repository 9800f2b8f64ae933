"""A calibrated KV cache by --stream: scales of transformers' own cache, kept, loaded, refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from megatron_quant.ckpt.read import QuantizedCheckpoint
from megatron_quant.errors import CalibrationError, RecipeError
from megatron_quant.evaluation import load
from megatron_quant.runs import file_layers
from megatron_quant.runs.batches import calibration_batches
from tests.dist import checkpoints
from tests.dist.checkpoints import tokenizer
from tests.dist.test_layouts import digests
from tests.unit import family_models, hf_models, sources
from tests.unit.test_stream_inputs import options, run

KV = {"export_quant_cfg": "nvfp4_experts_only", "export_kv_cache_quant": "fp8"}
SCALES = ("k_scale", "v_scale")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("qwen3"))


def cached(source: Path, out: Path) -> dict[str, float]:
    """Largest keys and values in transformers' own cache, by cache slot, over the run's text."""
    batches = calibration_batches(options(source, out).calibration, source, 258)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    found: dict[str, float] = {}
    for ids in batches:
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        for i, layer in enumerate(cache.layers):
            for part, states in (("k", layer.keys), ("v", layer.values)):
                name = f"model.layers.{i}.self_attn.{part}"
                found[name] = max(found.get(name, 0.0), states.abs().max().item())
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_scales_are_those_of_transformers_own_cache(name: str, tmp_path: Path) -> None:
    made = hf_models if name in hf_models.MODELS else checkpoints
    source, out = made.save(name, tmp_path / "source"), tmp_path / "out"
    streamed = run(source, out, **KV)
    assert dict(streamed.kv_amax) == pytest.approx(cached(source, out), rel=1e-2)
    stored = sources.tensors(out)
    for slot, amax in streamed.kv_amax.items():
        attention, _, part = slot.rpartition(".")
        assert stored[f"{attention}.{part}_proj.{part}_scale"].item() == pytest.approx(amax / 448)
    assert len(streamed.kv_amax) == 4


def test_only_layers_that_cache_keys_and_values_have_scales(tmp_path: Path) -> None:
    """The others of Qwen3-Next keep the state of a delta rule."""
    source = hf_models.save("qwen3_next", tmp_path / "source")
    streamed = run(source, tmp_path / "out", **KV)
    assert list(streamed.kv_amax) == [f"model.layers.1.self_attn.{part}" for part in "kv"]
    stored = [n for n in sources.tensors(tmp_path / "out") if n.endswith(SCALES)]
    assert len(stored) == 2


@pytest.mark.parametrize("name", ["kimi_linear", "bailing_hybrid"])
def test_linear_attention_with_a_k_proj_caches_no_keys(name: str, tmp_path: Path) -> None:
    source, out = family_models.save(name, tmp_path / "source"), tmp_path / "out"
    tokenizer().save_pretrained(source)
    with pytest.raises(RecipeError, match="latent attention caches keys and values as one"):
        run(source, out, **KV)
    sources.run(source, out, **{**KV, "export_kv_cache_quant": "fp8_cast"})
    assert not [n for n in sources.tensors(out) if n.endswith(SCALES)]


def test_a_saved_calibration_gives_the_same_bytes(qwen3: Path, tmp_path: Path) -> None:
    file = tmp_path / "kept.safetensors"
    run(qwen3, tmp_path / "one", **KV, save_calibration=file)
    run(qwen3, tmp_path / "two", **KV, load_calibration=file)
    one, two = (digests(tmp_path / name) for name in ("one", "two"))
    assert one == two
    run(qwen3, tmp_path / "three", export_quant_cfg="nvfp4", save_calibration=file, overwrite=True)
    with pytest.raises(CalibrationError, match=r"has no model\.layers.0.self_attn\.k_cache_amax"):
        run(qwen3, tmp_path / "four", **KV, load_calibration=file)


class Rounding(DynamicCache):
    """What an engine caches, by torch's own cast; ``scales`` of keys and values by layer."""

    def __init__(self, scales: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self._own_scales = scales

    def update(self, keys, values, layer, *rest):
        k, v = self._own_scales[layer]
        held = [
            (x.float() / s).to(torch.float8_e4m3fn).float() * s for x, s in ((keys, k), (values, v))
        ]
        return super().update(held[0].to(keys.dtype), held[1].to(values.dtype), layer, *rest)


def test_an_evaluation_rounds_keys_and_values_by_the_stored_scales(
    qwen3: Path, tmp_path: Path
) -> None:
    """As fake quant of the live model does; without, the export would look better than it is."""
    out = tmp_path / "out"
    run(qwen3, out, **{**KV, "export_quant_cfg": "w4a16_nvfp4"})
    stored = sources.tensors(out)
    names = [f"model.layers.{i}.self_attn" for i in range(2)]
    scales = [tuple(stored[f"{n}.{p}_proj.{p}_scale"] for p in "kv") for n in names]
    ids = torch.arange(40) % 250
    model = load._dense(QuantizedCheckpoint(out), out, torch.float32)
    with torch.no_grad():
        plain = model(ids[None], use_cache=False).logits[0]
        wanted = model(ids[None], past_key_values=Rounding(scales)).logits[0]
    found = load.decoded(out, torch.float32)(ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


def test_the_cache_alone_is_calibrated(qwen3: Path, tmp_path: Path) -> None:
    """No weight's input needs data; the layers run all the same."""
    streamed = run(qwen3, tmp_path / "out", **{**KV, "export_quant_cfg": "int4"})
    assert streamed.inputs is None and len(streamed.kv_amax) == 4


def test_a_model_that_runs_whole_is_refused(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_layers, "by_layers", lambda *_: None)
    with pytest.raises(CalibrationError, match=r"measured layer by layer, .* fp8_cast"):
        run(qwen3, tmp_path / "out", **KV)


def test_keys_that_are_not_finite_are_named(tmp_path: Path) -> None:
    broken = checkpoints.save("qwen3_moe", tmp_path / "broken")

    def spoil(found: sources.Tensors) -> None:
        found["model.layers.1.self_attn.k_norm.weight"][0] = torch.inf

    sources.edit(broken, spoil)
    with pytest.raises(CalibrationError, match=r"layers.1.*(NaN|Inf)"):
        run(broken, tmp_path / "out", **{**KV, "export_quant_cfg": "int4"})
