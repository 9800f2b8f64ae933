"""Training that starts from the quantizers of a distributed checkpoint, at any layout."""

from pathlib import Path

import pytest
import torch

from megatron_quant.errors import CheckpointError, QuantError
from megatron_quant.models import Pipeline
from tests.dist import checkpoints, saved
from tests.dist.pool import Ranks
from tests.dist.test_training import BATCHES, Layout, whole

SAVED_AT: Layout = (2, 2, Pipeline())
# (ranks, layout)
LAYOUTS: list[tuple[int, Layout]] = [
    (1, (1, 1, Pipeline())),
    (4, (1, 4, Pipeline())),
    (4, (2, 1, Pipeline(2))),
    (2, (1, 1, Pipeline(2, 2))),
]
Found = tuple[float, dict[str, list[float]], dict]
"""The loss of the next step, the ranges by layer, and the slices of weights of a rank."""


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe")
    sizes = {"num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 128}
    return checkpoints.save("qwen3_moe", path, **sizes, mlp_only_layers=[1])


def _build(path: Path, layout: Layout, dtype: torch.dtype = torch.float32) -> list:
    from tests.dist import live, training

    tp, ep, pipeline = layout
    return training.build(path, live.Parallelism(tp, ep, pipeline=pipeline), dtype)


def _next(model: list, callback: object, step: int) -> Found:
    """What step ``step`` of a prepared model starts from."""
    from megatron_quant.mcore.live import quantized
    from tests.dist import training

    script = training.wrap(model)
    callback.start(script.model)
    callback.on_step_begin(step)
    layers = quantized(script.model).layers
    assert all(q.is_enabled for layer in layers for q in layer.quantizers)
    ranges = {layer.name: [float(q.amax) for q in layer.quantizers] for layer in layers}
    weights = training.slices(script, lambda parameter: parameter)
    return script.forward_backward(BATCHES), ranges, weights


def _save(path: Path, out: Path) -> Found:
    """Calibrate, train two steps with ranges of the first one's weights, and save."""
    from megatron_quant.mcore.checkpoint import store
    from megatron_quant.mcore.training import QuantCallback, Schedule
    from megatron_quant.mcore.live import quantized
    from megatron_quant.mcore.training import prepare
    from megatron_quant.mcore.model.schedule import forward
    from tests.dist import training

    model = prepare(_build(path, SAVED_AT), "nvfp4", hf_model=str(path))
    script = training.wrap(model)
    callback = QuantCallback(Schedule(calibrate_before=0), log=lambda line: None)
    callback.start(script.model)
    callback.calibrate([lambda ids=ids: forward(model, ids) for ids in BATCHES])
    for step in range(2):
        callback.on_step_begin(step)
        script.step(BATCHES)
    of = quantized(model).model
    if of.groups.rank == 0:
        out.mkdir()
    torch.distributed.barrier()
    store.save(of.chunks, out, of.groups)
    ranges = {x.name: [float(q.amax) for q in x.quantizers] for x in quantized(model).layers}
    weights = training.slices(script, lambda parameter: parameter)
    return script.forward_backward(BATCHES), ranges, weights


@pytest.fixture(scope="module")
def first(
    moe: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks
) -> tuple[Path, list[Found]]:
    """The checkpoint, and what every rank that wrote it went on with."""
    out = tmp_path_factory.mktemp("first") / "saved"
    return out, ranks(4, _save, moe, out)


def _load(path: Path, stored: Path, layout: Layout) -> Found:
    from megatron_quant.mcore.training import QuantCallback
    from megatron_quant.mcore.training import prepare

    model = prepare(_build(path, layout), "nvfp4", stored, hf_model=str(path))
    return _next(model, QuantCallback(log=lambda line: None), 0)


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_every_layout_starts_from_the_saved_quantizers(
    ranks: Ranks, moe: Path, first: tuple[Path, list[Found]], world: int, layout: Layout
) -> None:
    """Weights and ranges are equal to the bit, the loss to what flipped codes of inputs move."""
    stored, wanted = first
    found = ranks(world, _load, moe, stored, layout)
    ranges = {name: held for _, of_rank, _ in found for name, held in of_rank.items()}
    assert ranges == wanted[0][1]
    want = whole([weights for _, _, weights in wanted])
    got = whole([weights for _, _, weights in found])
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], weight) for name, weight in want.items())
    losses = [torch.tensor([loss for loss, *_ in of]).nanmean().item() for of in (wanted, found)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def _sixteen_bits(path: Path, stored: Path) -> None:
    from megatron.core.transformer.module import Float16Module

    from megatron_quant.calib.training import ranges_of
    from megatron_quant.layers.install import ExpertScales
    from megatron_quant.mcore.training import QuantCallback
    from megatron_quant.mcore.live import quantized
    from megatron_quant.mcore.training import prepare
    from megatron_quant.mcore.model.schedule import forward
    from tests.dist import training

    model = _build(path, (1, 1, Pipeline()), torch.bfloat16)
    apart = ExpertScales.PER_EXPERT
    model = prepare(model, "nvfp4", stored, hf_model=str(path), expert_scales=apart)
    layers = quantized(model).layers
    assert {x.module.per_expert for x in layers if x.grouped} == {True}
    held = ranges_of(layers)
    script = training.wrap([Float16Module(model[0].config, model[0])])
    callback = QuantCallback(log=lambda line: None)
    callback.start(script.model)
    callback.on_step_begin(0)
    for quantizer, ranges in zip((q for x in layers for q in x.quantizers), held, strict=True):
        assert torch.equal(quantizer.amax, ranges["_amax"]), "not those of the checkpoint"
    before = [float(x.input_amax()) for x in layers]
    callback.calibrate([lambda: forward(model, BATCHES[0])])
    assert [float(x.input_amax()) for x in layers] != before


def test_ranges_stay_until_calibration_is_asked_for(
    ranks: Ranks, moe: Path, first: tuple[Path, list[Found]]
) -> None:
    """In 16 bits, which do not hold them, and with the expert scales that are wanted."""
    ranks(1, _sixteen_bits, moe, first[0])


def _refused(path: Path, stored: Path, recipe: str) -> None:
    from megatron_quant.mcore.training import prepare

    prepare(_build(path, (2, 1, Pipeline())), recipe, str(stored), hf_model=str(path))


AMAX = "decoder.layers.1.mlp.linear_fc1.input_quantizer._amax"
EXTRA = "decoder.layers.1.mlp.linear_fc1.output_quantizer._amax"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ("absent", CheckpointError, "holds no distributed checkpoint"),
        ("recipe", QuantError, "was saved with recipe 'nvfp4', which treats "),
        ("missing", CheckpointError, f"has no {AMAX}"),
        ("beyond", CheckpointError, f"has {EXTRA} (1 in all), which the model lacks"),
    ],
)
def test_every_rank_refuses(
    ranks: Ranks,
    moe: Path,
    first: tuple[Path, list[Found]],
    tmp_path: Path,
    change: str,
    kind: type,
    words: str,
) -> None:
    stored, changes = first[0], {"missing": (AMAX, ""), "beyond": ("", EXTRA)}
    if change == "absent":
        stored = tmp_path / "nothing"
    if change in changes:
        stored = tmp_path / change
        ranks(1, saved.change_keys, first[0], [stored], [changes[change]])
    recipe = "fp8" if change == "recipe" else "nvfp4"
    for error in ranks.errors(2, _refused, moe, stored, recipe):
        assert isinstance(error, kind), error
        assert words in str(error)
