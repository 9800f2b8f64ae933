"""The KV cache as a place of a search: its cost, its scores, and the recipe that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import megatron_quant as mq
from megatron_quant.ckpt.dialects import StorageSchemes, get_dialect
from megatron_quant.ckpt.plan import slots
from megatron_quant.ckpt.read import logical, open_source
from megatron_quant.dist import Groups
from megatron_quant.errors import QuantError, RecipeError
from megatron_quant.formats import fake_quant, get_format
from megatron_quant.recipes import load_recipe, parse_recipe, resolve
from megatron_quant.search import Model, Place, Problem, find_problem, to_recipe
from tests.dist import checkpoints
from tests.unit.search_world import scores, whole_model, work_of

TEXT = Path(__file__)
CAST = {"rules": [{"quantize": ["*"], "weights": "nvfp4"}], "kv_cache": "fp8_cast"}
LAYERS = 2
"""Of the small model."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def problem(source: Path, context: int | None, **config: Any) -> Problem:
    checkpoint, structure = logical(open_source(source))
    schemes = StorageSchemes(get_dialect("compressed-tensors"), torch.bfloat16, {})
    of = Model(params=structure.params, config=checkpoint.config | config, schemes=schemes)
    of_slot = slots(structure.params)
    plans = {
        "cast": resolve(parse_recipe("cast", CAST), of_slot),
        "fp8_channel": resolve(load_recipe("fp8_channel"), of_slot),
    }
    return find_problem(of, plans, context=context)


def cache_of(found: Problem) -> Place:
    (place,) = [p for p in found.places if p.cached]
    assert found.places[-1] is place
    return place


def test_the_cache_costs_what_a_token_reads(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    width = 2 * config["num_key_value_heads"] * config["head_dim"]
    layers = config["num_hidden_layers"]
    place = cache_of(problem(source, 1000))
    values = layers * width * 1000
    assert [(o.kv_cache, o.nbytes) for o in place.options] == [
        ("fp8_cast", values),
        ("", 2 * values),
    ]
    assert [o.candidates for o in place.options] == [
        ("cast",),
        ("fp8_channel", "none"),
    ]
    kinds = ["sliding_attention", "full_attention"]
    windowed = problem(source, 1000, layer_types=kinds, sliding_window=100)
    assert cache_of(windowed).cached == width * (100 + 1000)


def test_a_long_context_takes_a_small_cache_and_a_short_one_does_not(source: Path) -> None:
    """At the same bits above what weights take: a short cache is worth less than weights."""
    for context, cache in ((1, ""), (4096, "fp8_cast")):
        found = problem(source, context)
        low, _ = found.bounds("active")
        scores = {
            p.name: [(1 + bool(p.cached)) * (1.0 + i) * o.changes for i, o in enumerate(p.options)]
            for p in found.places
        }
        chosen = found.solved(scores, round(low + 5, 3), "active")
        recipe = to_recipe(found, chosen, "found", "")
        assert recipe.kv_cache == cache, context
        assert any(rule.weights for rule in recipe.rules)
        by_weight = found.solved(scores, 8.5, "weight")
        assert to_recipe(found, by_weight, "found", "").kv_cache == ""


def test_a_bound_that_the_cache_alone_meets(source: Path) -> None:
    found = problem(source, 4096)
    scores = {p.name: [1.0 * o.changes for o in p.options] for p in found.places}
    _, high = found.bounds("active")
    with pytest.raises(RecipeError, match="is met by the KV cache in fp8_cast alone") as error:
        found.solved(scores, round(high - 1, 3), "active")
    assert "\n" not in str(error.value)


def cache_scores(source: Path, ids: torch.Tensor, method: str, folder: Path) -> list[float]:
    (folder / "cast.yaml").write_text(json.dumps(CAST))
    given: dict[str, Any] = {"cost": "active", "context_length": 10, "bits": 15.0}
    work = work_of(source, [ids], f"{folder / 'cast.yaml'},fp8_channel", method, **given)
    return scores(work, source)["KV cache"]


def test_a_gradient_score_is_gradient_times_change_of_what_is_cached(
    source: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = whole_model(source)
    model.get_input_embeddings().weight.requires_grad_(True)
    held: list[torch.Tensor] = []

    class Held(DynamicCache):
        layer = 0

        def update(self, k: torch.Tensor, v: torch.Tensor, index: int, *rest: Any) -> Any:
            if index == self.layer:  # the graph begins at its cache
                k, v = (x.detach().requires_grad_() for x in (k, v))
                held[:] = [k, v]
            return super().update(k, v, index, *rest)

    wanted = 0.0
    for layer in range(LAYERS):
        Held.layer = layer
        logits = model(ids, past_key_values=Held(config=model.config), use_cache=True).logits
        flat = logits[:, :-1].flatten(0, 1).float()
        loss = F.cross_entropy(flat, ids[:, 1:].flatten(), reduction="sum")
        for x, gradient in zip(held, torch.autograd.grad(loss, held), strict=True):
            change = fp8(x.detach()).float() - x.detach().float()
            wanted += (gradient.float() * change).square().sum().item()
    found = cache_scores(source, ids, "gradient", tmp_path)
    assert found == [pytest.approx(wanted, rel=1e-5), 0.0]
    assert wanted > 0


def fp8(x: torch.Tensor) -> torch.Tensor:
    return fake_quant(x.contiguous(), get_format("fp8"), torch.tensor(1.0))


def test_a_divergence_score_is_that_of_the_logits(
    source: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = whole_model(source)

    class Cast(DynamicCache):
        def update(self, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
            return super().update(fp8(k), fp8(v), *rest)

    caches = (DynamicCache(config=model.config), Cast(config=model.config))
    with torch.no_grad():
        before, after = (
            F.log_softmax(model(ids, past_key_values=c, use_cache=True).logits.float(), -1)
            for c in caches
        )
    wanted = (before.exp() * (before - after)).sum().item()
    found = cache_scores(source, ids, "kl_div", tmp_path)
    assert found == [pytest.approx(wanted, rel=1e-3), 0.0]
    assert wanted > 0


def search(
    source: Path, out: Path, formats: str, kv_cache: str | None = None, **changes: Any
) -> dict[str, Any]:
    """Search, export what is found, and return the export's config."""
    given: dict[str, Any] = {"bits": 20.0, "cost": "active", "context_length": 4096}
    auto = mq.AutoQuantize(
        **(given | changes),
        formats=formats,
        score_size=4,
        checkpoint=out / "scores",
        recipe=out / "found.yaml",
    )
    data = mq.Calibration(
        dataset=str(TEXT), size=4, seq_length=16, batch_size=2, cold_experts="layer-max"
    )
    mq.stream(
        source,
        None,
        out / "out",
        calibration=data,
        format="compressed-tensors",
        export_kv_cache_quant=kv_cache,
        auto=auto,
        groups=Groups(),
        write=mq.Write(overwrite=True, fsync=False),
    )
    config: dict[str, Any] = json.loads((out / "out" / "config.json").read_text())
    return config


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_the_found_recipe_names_the_cache_and_exports(
    source: Path, tmp_path: Path, method: str
) -> None:
    recipe = tmp_path / "cached.yaml"
    recipe.write_text(json.dumps(CAST))
    formats = f"{recipe},fp8_channel"
    with pytest.raises(RecipeError) as least:
        search(source, tmp_path, formats, bits=0.1)
    low = float(str(least.value).split(" is below ")[1].split(",")[0])
    config = search(source, tmp_path, formats, bits=low + 1, method=method)
    assert load_recipe(tmp_path / "found.yaml").kv_cache == "fp8_cast"
    assert config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    scores = tmp_path / "scores"
    again = mq.search_again(scores, low + 1, cost="active")
    assert again.rows[-1][:2] == ("KV cache", "fp8_cast")
    document = again.document()["places"][-1]
    assert [(o["format"], o["bits"]) for o in document["options"]] == [
        ("fp8_cast", 8.0),
        ("none", 16.0),
    ]
    assert mq.search_again(scores, 8.5).recipe.kv_cache == ""


def test_a_cache_that_is_left_overrides_what_the_candidates_were_given(
    source: Path, tmp_path: Path
) -> None:
    """The flag gives the candidates their cache, and is no part of the export that follows."""
    _, high = problem(source, 4096).bounds("active")
    config = search(source, tmp_path, "fp8_channel", "fp8_cast", bits=round(high - 0.1, 3))
    assert load_recipe(tmp_path / "found.yaml").kv_cache == ""
    assert config["quantization_config"]["kv_cache_scheme"] is None


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    latent = checkpoints.save("deepseek_v3", tmp_path)
    with pytest.raises(RecipeError, match="caches no keys and values as they are, so its cache"):
        problem(latent, 10)


def test_what_is_refused(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "cached.yaml"
    recipe.write_text(json.dumps(CAST))
    with pytest.raises(QuantError, match="add --auto-quantize-cost active, or leave it out"):
        mq.AutoQuantize(bits=5.0, context_length=10)
    with pytest.raises(QuantError, match="--auto-quantize-context-length is 0: give at least 1"):
        mq.AutoQuantize(bits=5.0, context_length=0, cost="active")
    with pytest.raises(RecipeError, match=r"differently; say how .* --auto-quantize-cost active"):
        search(source, tmp_path, f"{recipe},fp8_channel", context_length=None)
    with pytest.raises(RecipeError, match="candidates that quantize the KV cache, and none does"):
        search(source, tmp_path, "fp8_channel")
    assert not (tmp_path / "scores").exists() and not (tmp_path / "out").exists()
