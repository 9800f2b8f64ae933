"""A search on a live Megatron model, at any layout: the recipe that --stream finds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from safetensors.torch import load_file

import megatron_quant as mq
from megatron_quant.dist import Groups
from megatron_quant.errors import CalibrationError, CheckpointError, LayoutError, QuantError
from megatron_quant.formats import fake_quant, get_format, tensor_scale
from megatron_quant.runs.batches import calibration_batches
from megatron_quant.search import next_token_loss
from tests.dist import checkpoints
from tests.unit.search_world import whole_model

TEXT = Path(__file__)
DATA = mq.Calibration(
    dataset=str(TEXT), size=4, seq_length=16, batch_size=1, cold_experts="layer-max"
)
LAYOUTS = [
    (1, {}),
    (4, {"tp": 2, "ep": 2}),
    (2, {"pp": 2}),
    (4, {"tp": 2, "etp": 2, "pp": 2}),
    (4, {"cp": 2, "tp": 2}),
    (4, {"cp": 2, "pp": 2}),
]
BATCHES = [f"batch-{i}.safetensors" for i in range(4)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


def auto(work: Path, **changes: Any) -> mq.AutoQuantize:
    work.mkdir(exist_ok=True, parents=True)
    given = {"bits": 6.0, "formats": "nvfp4,fp8", "score_size": 4}
    files = {"checkpoint": work / "scores", "recipe": work / "found.yaml"}
    return mq.AutoQuantize(**{**given, **files, **changes})


def cached(folder: Path, *kinds: str) -> str:
    """Return recipes of nvfp4 with a KV cache of each kind, and the output layer in fp8."""
    head = {"quantize": ["lm_head"], "weights": "fp8", "inputs": "fp8", "allow_output": True}
    for kind in kinds:
        rules = [head, {"quantize": ["*"], "weights": "nvfp4"}]
        recipe = {"rules": rules, "kv_cache": kind}
        (folder / f"{kind}.yaml").write_text(json.dumps(recipe))
    return ",".join(f"{folder}/{kind}.yaml" for kind in kinds)


CACHE = {"cost": "active", "context_length": 1000}


def find(
    source: Path,
    work: Path,
    sizes: dict[str, int] | None,
    method: str = "gradient",
    changes: dict[str, Any] | None = None,
    dtype: str = "fp32",
) -> None:
    """Search in fp32, in which layouts differ less than formats; ``sizes`` None: by --stream."""
    mq.find_recipe(
        source,
        auto(work, method=method, **(changes or {})),
        parallel=None if sizes is None else mq.Parallel(**sizes),
        calibration=DATA,
        dtype=dtype,
        groups=Groups() if sizes is None else None,
    )


def scores(work: Path) -> torch.Tensor:
    return torch.stack([load_file(work / "scores" / name)["scores"] for name in BATCHES])


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_every_layout_finds_the_recipe_that_stream_finds(
    source: Path, tmp_path: Path, ranks: Any, method: str
) -> None:
    changes = CACHE | {"formats": f"{cached(tmp_path, 'fp8_cast')},fp8", "bits": 17.0}
    find(source, tmp_path / "stream", None, method, changes)
    wanted = (tmp_path / "stream" / "found.yaml").read_bytes()
    assert b"kv_cache: fp8_cast" in wanted and b"allow_output: true" in wanted
    alone = scores(tmp_path / "stream")
    assert (alone.sum(0)[[0, 1, 3, 4, -2]] > 0).all() and alone[:, -1].tolist() == [0.0] * 4
    layouts = LAYOUTS if method == "gradient" else [LAYOUTS[1], LAYOUTS[-1]]
    for number, (world, sizes) in enumerate(layouts):
        work = tmp_path / str(number)
        ranks(world, find, source, work, sizes, method, changes)
        assert (work / "found.yaml").read_bytes() == wanted, sizes
        torch.testing.assert_close(scores(work), alone, rtol=0.05, atol=1e-3 * alone.max().item())


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_a_pipeline_changes_no_bit_of_a_score(
    source: Path, tmp_path: Path, ranks: Any, method: str
) -> None:
    """In bf16, whose rounding is all that other forwards differ by."""
    for world, sizes in ((1, {}), (2, {"pp": 2})):
        ranks(world, find, source, tmp_path / str(world), sizes, method, {}, "bf16")
    one, two = scores(tmp_path / "1"), scores(tmp_path / "2")
    assert torch.equal(one, two) and (one.sum(0)[[0, 1, 3, 4]] > 0).all()


class _Kept(DynamicCache):
    """A cache that keeps its keys and values, and has the graph keep their gradients."""

    def __init__(self, config: Any, amaxes: dict[int, Any]) -> None:
        super().__init__(config=config)
        self.amaxes = amaxes
        self.kept: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def update(self, k: torch.Tensor, v: torch.Tensor, layer: int, *rest: Any) -> Any:
        k.retain_grad()
        v.retain_grad()
        self.kept.append((layer, k, v))
        before = self.amaxes.get(layer, (torch.zeros(()), torch.zeros(())))
        largest = (x.detach().abs().max() for x in (k, v))
        self.amaxes[layer] = tuple(map(torch.maximum, before, largest))
        return super().update(k, v, layer, *rest)


def test_a_cache_is_scored_with_the_scales_that_calibration_gives_it(
    source: Path, tmp_path: Path, ranks: Any
) -> None:
    changes = CACHE | {"formats": cached(tmp_path, "fp8", "fp8_cast"), "bits": 17.0}
    ranks(4, find, source, tmp_path / "live", {"tp": 2, "pp": 2}, "gradient", changes)
    model = whole_model(source, torch.float32)
    model.get_input_embeddings().weight.requires_grad_(True)
    amaxes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    runs = [_Kept(model.config, amaxes) for _ in range(4)]
    for ids, cache in zip(calibration_batches(DATA, source, 258), runs, strict=True):
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        next_token_loss(logits.float(), ids).backward()
    wanted = [0.0, 0.0]
    for layer, *both in (each for cache in runs for each in cache.kept):
        for x, largest in zip(both, amaxes[layer], strict=True):
            for i, amax in enumerate((largest.detach(), torch.tensor(448.0))):
                scale = tensor_scale(amax, get_format("fp8"))
                change = fake_quant(x.detach().contiguous(), get_format("fp8"), scale) - x.detach()
                wanted[i] += (x.grad * change).square().sum().item()
    ranks(2, stream, source, tmp_path / "stream", changes)
    for how in ("live", "stream"):
        first, second, none = scores(tmp_path / how).sum(0)[-3:].tolist()
        assert first == pytest.approx(wanted[0], rel=1e-3) and none == 0.0, how
        assert second == pytest.approx(wanted[1], rel=1e-3), how
    found = [(tmp_path / how / "found.yaml").read_bytes() for how in ("live", "stream")]
    assert found[0] == found[1]
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-2)


def stream(source: Path, work: Path, changes: dict[str, Any]) -> None:
    mq.find_recipe(source, auto(work, **changes), calibration=DATA, dtype="fp32")


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_latent_attention_shared_experts_and_biases_score_as_by_stream(
    name: str, tmp_path: Path, ranks: Any
) -> None:
    other = checkpoints.save(name, tmp_path / "model")
    find(other, tmp_path / "stream", None)
    ranks(4, find, other, tmp_path / "live", {"tp": 2, "ep": 2})
    found, alone = scores(tmp_path / "live"), scores(tmp_path / "stream")
    torch.testing.assert_close(found.sum(0), alone.sum(0), rtol=0.1, atol=1e-3 * alone.sum().item())
    names = [tmp_path / how / "found.yaml" for how in ("live", "stream")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_search_goes_on_at_another_layout(source: Path, tmp_path: Path, ranks: Any) -> None:
    work = tmp_path / "work"
    ranks(2, find, source, work, {"pp": 2})
    before, recipe = scores(work), (work / "found.yaml").read_bytes()
    kept = {name: (work / "scores" / name).read_bytes() for name in BATCHES}
    for name in BATCHES[1:3]:
        (work / "scores" / name).unlink()
    ranks(2, find, source, work, {"ep": 2})
    assert (work / "found.yaml").read_bytes() == recipe
    again = {name: (work / "scores" / name).read_bytes() for name in BATCHES}
    assert [again[name] == kept[name] for name in (BATCHES[0], BATCHES[3])] == [True, True]
    torch.testing.assert_close(scores(work), before, rtol=0.05, atol=1e-3 * before.max().item())


def quantized(source: Path, work: Path) -> float:
    outcome = mq.quantize_checkpoint(
        source,
        None,
        work / "out",
        parallel=mq.Parallel(pp=2),
        calibration=DATA,
        auto=auto(work, checkpoint=None),
        write=mq.Write(fsync=False),
        report=work / "report.json",
    )
    assert outcome.found is not None
    return outcome.found.bits


def test_what_megatron_finds_is_exported_and_reported(
    source: Path, tmp_path: Path, ranks: Any
) -> None:
    first, second = ranks(2, quantized, source, tmp_path / "w")
    report = json.loads((tmp_path / "w" / "report.json").read_text())
    assert first == second == report["search"]["bits"] <= 6.0
    assert mq.verify(tmp_path / "w" / "out", against=source).problems == ()
    again = mq.stream(
        source,
        str(tmp_path / "w" / "found.yaml"),
        tmp_path / "again",
        calibration=DATA,
        groups=Groups(),
        write=mq.Write(fsync=False),
    )
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("w/out", "again")]
    assert sizes[0] == sizes[1] and again.found is None


# --- a live model -------------------------------------------------------------------------------


def half_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Half the loss of the next token: a fourth of each score."""
    assert logits.shape == (*ids.shape, 258) and logits.dtype == torch.float32
    flat = logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten(), reduction="sum") / 2


def on_a_live_model(source: Path, work: Path) -> list[Any]:
    from tests.dist.live import Parallelism, load

    live = load(source, Parallelism(tp=2, ep=2))
    chunk = live.module.train()
    chunk.config.grad_scale_func = scale = torch.mul
    parts = {name: (type(m), set(vars(m))) for name, m in chunk.named_modules()}
    found = mq.find_recipe(chunk, auto(work), hf_model=source, calibration=DATA)
    again = {name: (type(m), set(vars(m))) for name, m in chunk.named_modules()}
    assert parts == again
    assert all(m.training for m in chunk.modules()) and chunk.config.grad_scale_func is scale
    assert all(p.requires_grad and p.grad is None for p in chunk.parameters())
    halved = mq.find_recipe(
        chunk, auto(work, checkpoint=work / "half"), hf_model=source, calibration=DATA,
        loss=half_loss,
    )
    chunk.config.grad_scale_func = None
    handle = mq.quantize(chunk.eval(), found.recipe, hf_model=source, calibration=DATA)
    formats = {layer.name: layer.decisions[0].weights for layer in handle.layers}
    mq.export(handle, work / "out", write=mq.Write(fsync=False))
    own = [
        fmt == place.options[i].rule.weights
        for place, i in zip(found.choice.problem.places, found.choice.chosen, strict=True)
        for fmt in [formats.get(layer_of(place.name))]
    ]
    ratio = [
        one / other
        for name in found.choice.scores
        for one, other in zip(found.choice.scores[name], halved.choice.scores[name], strict=True)
        if one
    ]
    return [own, ratio]


def layer_of(place: str) -> str:
    """The Megatron module of a place of this model."""
    names = {"o_proj": "self_attention.linear_proj", "experts": "mlp.experts.linear_fc1"}
    parts = place.split(".")
    return f"decoder.layers.{parts[2]}.{names.get(parts[-1], 'self_attention.linear_qkv')}"


def test_a_live_model_is_scored_and_left_as_it_was(
    source: Path, tmp_path: Path, ranks: Any
) -> None:
    for own, ratio in ranks(4, on_a_live_model, source, tmp_path / "work"):
        assert own == [True] * 6
        assert ratio == pytest.approx([4.0] * len(ratio), rel=1e-3)
    assert mq.verify(tmp_path / "work" / "out").problems == ()


# --- what is refused ----------------------------------------------------------------------------


def with_nan_loss(source: Path, work: Path) -> None:
    mq.find_recipe(
        source,
        auto(work),
        parallel=mq.Parallel(pp=2),
        calibration=DATA,
        loss=lambda logits, ids: logits.sum() * float("nan"),
    )


def test_a_loss_that_is_not_finite_is_one_line_on_every_rank(
    source: Path, tmp_path: Path, ranks: Any
) -> None:
    for error in ranks.errors(2, with_nan_loss, source, tmp_path / "w"):
        assert isinstance(error, CalibrationError)
        assert str(error).startswith("--auto-quantize-method gradient: the loss is nan; repair")
        assert "\n" not in str(error)
    assert [p.name for p in (tmp_path / "w" / "scores").iterdir()] == ["search.json"]


def raising(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("by design")


def with_raising_loss(source: Path, work: Path) -> None:
    mq.find_recipe(
        source, auto(work), parallel=mq.Parallel(pp=2), calibration=DATA, loss=raising
    )


def test_no_rank_waits_for_a_loss_that_raises(source: Path, tmp_path: Path, ranks: Any) -> None:
    first, last = ranks.errors(2, with_raising_loss, source, tmp_path / "w")
    assert isinstance(last, ZeroDivisionError)
    assert first is not None  # its connection is closed


def refused(source: Path, work: Path, length: int, changes: dict[str, Any]) -> None:
    data = mq.Calibration(dataset=str(TEXT), size=4, seq_length=length)
    parallel = mq.Parallel(**({"cp": 2} if changes.pop("cp", 1) == 2 else {"tp": 2}))
    mq.find_recipe(source, auto(work, **changes), parallel=parallel, calibration=data)


@pytest.mark.parametrize(
    ("length", "changes", "kind", "message"),
    [
        (16, {"bits": 4.2}, QuantError, "--auto-quantize-bits 4.2 is below"),
        (16, {"formats": "int4,mxfp8"}, QuantError, "int4 and mxfp8 cannot be mixed"),
        (16, {"keep": ("x*",)}, QuantError, "--auto-quantize-keep 'x*' matches no weight"),
        (14, {"cp": 2}, LayoutError, "--tp 1 x --cp 2 x 2 does not divide --calib-seq-length 14"),
        (15, {}, LayoutError, "--tp 2 does not divide --calib-seq-length 15"),
    ],
)
def test_refused_on_every_rank_before_a_model_is_built(
    source: Path,
    tmp_path: Path,
    ranks: Any,
    length: int,
    changes: dict[str, Any],
    kind: type[QuantError],
    message: str,
) -> None:
    for error in ranks.errors(2, refused, source, tmp_path / "w", length, changes):
        assert isinstance(error, kind) and message in str(error) and "\n" not in str(error)
    assert not (tmp_path / "w" / "scores").exists()


def test_scores_of_another_loss_are_refused(source: Path, tmp_path: Path) -> None:
    find(source, tmp_path / "w", None)
    with pytest.raises(CheckpointError, match="scores of another search"):
        mq.find_recipe(
            source,
            auto(tmp_path / "w"),
            calibration=DATA,
            dtype="fp32",
            loss=half_loss,
            groups=Groups(),
        )
    with pytest.raises(QuantError, match="loss= is for method gradient, not kl_div"):
        mq.find_recipe(source, auto(tmp_path, method="kl_div"), loss=half_loss)
    with pytest.raises(QuantError, match="AutoQuantize has no bits"):
        mq.find_recipe(source, mq.AutoQuantize())
    with pytest.raises(QuantError, match="a live model needs hf_model"):
        mq.find_recipe(torch.nn.Module(), mq.AutoQuantize(bits=5.0))
