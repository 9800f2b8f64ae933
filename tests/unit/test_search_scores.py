"""Scores by hand, by both methods; searches that stop, go on, or are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import megatron_quant as mq
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.dist import Groups
from megatron_quant.errors import CalibrationError, CheckpointError, QuantError, RecipeError
from megatron_quant.formats import fake_quant, get_format, tensor_scale
from megatron_quant.search.weights import PlaceWeights
from megatron_quant.streaming import stages
from tests.dist import checkpoints
from tests.unit import sources
from tests.unit.search_world import fit, places_of, scores, whole_model, work_of

TEXT = Path(__file__)
WEIGHT_ONLY = ("w4a16_nvfp4", "fp8_channel")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def rounded(w: torch.Tensor) -> torch.Tensor:
    fmt = get_format("nvfp4")
    return fake_quant(w, fmt, tensor_scale(w.abs().max().float(), fmt))


def test_a_gradient_score_is_gradient_times_change_of_the_output(source: Path, ids) -> None:
    model = whole_model(source)
    found = scores(work_of(source, [ids], "w4a16_nvfp4", "gradient"), source)
    linear = model.model.layers[0].self_attn.o_proj
    kept: list[torch.Tensor] = []
    embed = model.get_input_embeddings()
    handles = [
        embed.register_forward_hook(lambda m, a, out: out.detach().requires_grad_()),
        linear.register_forward_hook(lambda m, a, out: kept.extend((a[0], out)) or None),
    ]
    logits = model(ids).logits
    flat = logits[:, :-1].flatten(0, 1).float()
    loss = F.cross_entropy(flat, ids[:, 1:].flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, kept[1])
    for handle in handles:
        handle.remove()
    change = F.linear(kept[0], rounded(linear.weight)).float() - kept[1].float()
    wanted = (gradient.float() * change).square().sum().item()
    own = found["model.layers.0.self_attn.o_proj"]
    assert own == [pytest.approx(wanted, rel=1e-5), 0.0] and wanted > 0


def test_a_divergence_score_is_that_of_the_changed_model(source: Path, ids) -> None:
    model = whole_model(source)
    found = scores(work_of(source, [ids], "w4a16_nvfp4", "kl_div"), source)
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        before = F.log_softmax(model(ids).logits.float(), -1)
        both = (experts.gate_up_proj, experts.down_proj)
        for p in both:  # all experts of a layer share the scale of the tensor
            fmt = get_format("nvfp4")
            scale = tensor_scale(p.abs().max().float(), fmt)
            p.copy_(torch.stack([fake_quant(w, fmt, scale) for w in p]))
        after = F.log_softmax(model(ids).logits.float(), -1)
    wanted = (before.exp() * (before - after)).sum().item()
    assert found["model.layers.1.mlp.experts"] == [pytest.approx(wanted, rel=1e-3), 0.0]


def test_what_is_scored_is_what_is_exported(source: Path, ids, tmp_path: Path) -> None:
    places = places_of(fit(work_of(source, [ids], "w4a16_nvfp4", "gradient"), source))
    mq.stream(source, "w4a16_nvfp4", tmp_path / "out", format="compressed-tensors", groups=Groups())
    export = QuantizedCheckpoint(tmp_path / "out")
    compared = 0
    for weights in places:
        for held in weights.held:
            new = weights.rounded(held, weights.place.options[0].rule)
            for slot, w_NK in zip(held.slots, held.views(new), strict=True):
                own = [
                    s
                    for s in slot.sources
                    if held.parameter.dim() == 3 or s.endswith(held.name.split(".")[-2])
                ]
                stored = torch.cat([export.weight(f"{s}.weight", torch.bfloat16) for s in own])
                assert torch.equal(w_NK, stored), held.name
                compared += len(own)
    assert compared == 2 * (4 + 8 * 3)


# --- whole searches -----------------------------------------------------------------------------


def auto(tmp_path: Path, **changes: Any) -> mq.AutoQuantize:
    given = {"bits": 6.0, "formats": ",".join(WEIGHT_ONLY), "score_size": 6}
    files = {"checkpoint": tmp_path / "scores", "recipe": tmp_path / "found.yaml"}
    return mq.AutoQuantize(**{**given, **files, **changes})


def search(source: Path, tmp_path: Path, **changes: Any) -> bytes:
    """The bytes of the recipe that is found, and exported into ``tmp_path``."""
    chosen = auto(tmp_path, **changes)
    data = mq.Calibration(
        dataset=str(TEXT), size=6, seq_length=16, batch_size=2, cold_experts="layer-max"
    )
    mq.stream(
        source,
        None,
        tmp_path / "out",
        calibration=data,
        format="compressed-tensors",
        auto=chosen,
        groups=Groups(),
        write=mq.Write(overwrite=True, fsync=False),
    )
    return (tmp_path / "found.yaml").read_bytes()


def test_a_method_that_is_none_of_ours(tmp_path: Path) -> None:
    about = {"method": "guess"}
    place = {"name": "p", "family": "p", "modules": ["p"], "output": False, "elements": 1}
    option = {"candidates": ["none"], "nbytes": 2, "rule": {"exclude": ["*"]}}
    places = [place | {"active": 1, "stored": 1, "options": [option]}]
    document = {"about": about, "batches": 1, "candidates": ["none"], "left": [], "kv_cache": ""}
    (tmp_path / "search.json").write_text(json.dumps(document | {"places": places}))
    save_file({"scores": torch.zeros(1).double()}, tmp_path / "batch-0.safetensors")
    with pytest.raises(CheckpointError, match=r"method='guess' in .* one of gradient, kl_div"):
        mq.search_again(tmp_path, 6.0)


def check_document(found: mq.Found) -> None:
    """What reports draw: every score, the choice, and the curve that it lies on."""
    document = json.loads(json.dumps(found.document()))
    assert document["version"] == 1
    assert (document["method"], document["cost"], document["bound"]) == ("gradient", "weight", 6.0)
    options = [[o for o in place["options"] if o["chosen"]] for place in document["places"]]
    assert all(len(chosen) == 1 for chosen in options)
    assert sum(chosen["score"] for (chosen,) in options) == pytest.approx(document["score"])
    weighted = sum(
        p["weights"] * o["bits"] for p, (o,) in zip(document["places"], options, strict=True)
    )
    weights = sum(place["weights"] for place in document["places"])
    assert weighted / weights == pytest.approx(document["bits"])
    formats = {o["format"] for p in document["places"] for o in p["options"]}
    assert formats == {"nvfp4", "fp8_channel+fp8_channel", "none"}
    curve = [(point["bits"], point["score"]) for point in document["frontier"]]
    assert curve == sorted(curve) and curve[-1] == (16.0, 0.0)
    scores = [score for _, score in curve]
    assert scores == sorted(scores, reverse=True)
    within = [score for bits, score in curve if bits <= 6.0]
    assert within[-1] >= document["score"] >= curve[len(within)][1]
    assert document["excluded"] == []


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many layers ran."""
    found, run = [0], stages.Call.run

    def counted(*args: Any) -> torch.Tensor:
        found[0] += 1
        return run(*args)

    monkeypatch.setattr(stages.Call, "run", counted)
    return found


def test_other_bits_and_costs_are_solved_without_a_forward(
    source: Path, tmp_path: Path, calls: list[int]
) -> None:
    whole = search(source, tmp_path)
    calls[:] = [0]
    scores = tmp_path / "scores"
    again = mq.search_again(scores, 6.0, recipe=tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == whole
    assert again.bits <= 6.0
    assert sum(row[2] for row in mq.search_again(scores, 9.0).rows) < sum(r[2] for r in again.rows)
    assert mq.search_again(scores, 6.0, cost="active").recipe.rules
    one = mq.search_again(scores, 9.0, formats="fp8_channel")
    assert {row[1] for row in one.rows} <= {"fp8_channel+fp8_channel", "none"}
    assert calls == [0]
    check_document(again)
    with pytest.raises(RecipeError, match="'int4' was not scored"):
        mq.search_again(scores, 9.0, formats="int4")
    with pytest.raises(QuantError, match=r"^--bits 4\.2 is below"):
        mq.search_again(scores, 4.2)
    with pytest.raises(CheckpointError, match="has scores of another search"):
        search(source, tmp_path, formats="fp8_channel", bits=9.0)
    with pytest.raises(CheckpointError, match=r"\(method 'gradient', not 'kl_div'\)"):
        search(source, tmp_path, method="kl_div")
    bad = scores / "batch-1.safetensors"
    save_file({"scores": load_file(bad)["scores"].float()}, bad)
    with pytest.raises(CheckpointError, match=r"batch-1.* has no scores of this search"):
        mq.search_again(scores, 6.0)


def on_ranks(source: Path, tmp_path: Path) -> bytes:
    return search(source, tmp_path)


def test_ranks_share_the_batches_and_find_the_same_recipe(
    source: Path, tmp_path: Path, ranks: Any
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = search(source, tmp_path / "one")
    assert ranks(2, on_ranks, source, tmp_path / "two") == [alone, alone]
    files = sorted(p.name for p in (tmp_path / "two" / "scores").iterdir())
    assert files == [*(f"batch-{i}.safetensors" for i in range(3)), "search.json"]
    for name in files[:3]:
        a, b = (load_file(tmp_path / f / "scores" / name)["scores"] for f in ("one", "two"))
        assert torch.equal(a, b)


# --- what is refused before anything is scored --------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4.2}, r"--auto-quantize-bits 4\.2 is below"),
        ({"keep": ("nothing*",)}, r"--auto-quantize-keep 'nothing\*' matches no weight"),
        ({"formats": "nvfp5"}, "unknown quantization config 'nvfp5'"),
    ],
)
def test_refused_before_scoring(
    source: Path, tmp_path: Path, calls: list[int], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(QuantError, match=message) as error:
        search(source, tmp_path, **changes)
    assert "\n" not in str(error.value)
    assert calls == [0]
    assert not (tmp_path / "scores").exists() and not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite(source: Path, ids, tmp_path: Path) -> None:
    broken = shutil.copytree(source, tmp_path / "source")
    name = "lm_head.weight"
    sources.edit(broken, lambda t: t | {name: torch.full_like(t[name], torch.nan)})
    work = work_of(broken, [ids], "w4a16_nvfp4", "gradient", checkpoint=tmp_path / "scores")
    with pytest.raises(CalibrationError, match="gradient: the loss is nan; repair") as error:
        scores(work, broken)
    assert "\n" not in str(error.value)
    assert [p.name for p in (tmp_path / "scores").iterdir()] == ["search.json"]


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_a_score_that_is_not_finite(source: Path, ids, method: str, monkeypatch) -> None:
    """Rounded inputs that are not finite, though the unquantized model is."""
    first, own = "model.layers.0.self_attn.o_proj", PlaceWeights.rounded

    def broken(self: PlaceWeights, *args: Any) -> torch.Tensor:
        return own(self, *args) * (torch.nan if self.place.name == first else 1)

    monkeypatch.setattr(PlaceWeights, "rounded", broken)
    wanted = f"--auto-quantize-method {method}: the score is nan with {first} in nvfp4"
    with pytest.raises(CalibrationError, match=wanted) as error:
        scores(work_of(source, [ids], "w4a16_nvfp4", method), source)
    assert "\n" not in str(error.value)


def test_candidates_with_different_caches(source: Path, tmp_path: Path, calls: list[int]) -> None:
    recipe = tmp_path / "cached.yaml"
    rules = [{"quantize": ["*"], "weights": "nvfp4"}]
    recipe.write_text(json.dumps({"rules": rules, "kv_cache": "fp8_cast"}))
    with pytest.raises(RecipeError, match="treat the KV cache differently; say how with"):
        search(source, tmp_path, formats=f"{recipe},fp8_channel")
    assert calls == [0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"score_size": 0}, "--auto-quantize-score-size is 0: give at least 1"),
        ({"method": "hessian"}, "--auto-quantize-method is 'hessian': give one of gradient"),
        ({"formats": "none"}, "--auto-quantize-formats 'none' names no recipe"),
    ],
)
def test_flags_that_mean_nothing(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantError, match=message):
        mq.AutoQuantize(**flags)


def test_flags_that_exclude_one_another(source: Path, tmp_path: Path) -> None:
    chosen = mq.AutoQuantize(bits=5.0)
    with pytest.raises(QuantError, match="--export-quant-cfg gives one: leave one of them out"):
        mq.stream(source, "fp8", tmp_path / "o", auto=chosen)
    with pytest.raises(QuantError, match="--dry-run plans without weights"):
        mq.plan(source, None, auto=chosen, stream=True)
    with pytest.raises(QuantError, match="--auto-quantize-method is for a search: add --auto-quan"):
        mq.stream(source, "fp8", tmp_path / "o", auto=mq.AutoQuantize(method="kl_div"))
