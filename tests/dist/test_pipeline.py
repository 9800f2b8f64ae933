"""Pipeline parallelism: the same files at every number of stages, whatever else cuts the model."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_quant.errors import LayoutError
from megatron_quant.models import Pipeline, Stages
from tests.dist import checkpoints
from tests.dist.test_layouts import assert_agree, digests, folder, tensors
from tests.dist.test_logits import IDS
from tests.unit import tiny

VIRTUAL = "num_virtual_stages_per_pipeline_rank"
FIRST = "num_layers_in_first_pipeline_stage"
LAST = "num_layers_in_last_pipeline_stage"
# (ranks, flags) of models of four layers
LAYOUTS = [
    (4, {"pp": 4}),
    (4, {"pp": 2, "tp": 2, FIRST: 1}),
    (4, {"pp": 2, "ep": 2, VIRTUAL: 2}),
]
WEIGHTS = {
    "export_quant_cfg": "nvfp4_mse",
    "expert_scales": "per_expert",
    "weight_only": True,
}
CALIBRATED = {
    "export_quant_cfg": "nvfp4",
    "cold_experts": "layer-max",
    "export_kv_cache_quant": "fp8",
}


def export_all(source: Path, out: Path, flags: dict, cases: list[dict]) -> list[float]:
    """The KL that each run reports, where it evaluates."""
    from megatron_quant.runs.options import QuantizeOptions
    from megatron_quant.runs.megatron import quantize_run as quantize
    from megatron_quant.cli.console import ConsolePhases, console
    from megatron_quant.mcore.model.parallel import start_distributed

    groups = start_distributed()
    found = []
    for case in cases:
        options = QuantizeOptions.from_flags(
            hf_model_id=str(source),
            export_dir=out / folder(case),
            calib_size=12,
            calib_seq_length=32,
            calib_batch_size=5,  # the last batch is smaller
            max_shard_size="300KB",
            eval_text=source / "text.txt" if not case.get("weight_only") else None,
            **flags,
            **case,
        )
        outcome = quantize(options, groups, ConsolePhases(console()))
        if outcome.fake_quant:
            found += [outcome.fake_quant.perplexity, outcome.fake_quant.mean_kl]
    return found


def save(name: str, directory: Path, **changes: object) -> Path:
    source = checkpoints.save(name, directory, **changes)
    (source / "text.txt").write_text("Stages follow one another, and so do words. " * 4)  # 5 windows
    return source


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"hidden_size": 64, "num_hidden_layers": 4, "num_experts": 4, "head_dim": 32}
    sizes = {"moe_intermediate_size": 128, "intermediate_size": 128, "mlp_only_layers": [1]}
    return save("qwen3_moe", tmp_path_factory.mktemp("deep"), **changes, **sizes)


def test_exports_are_equal_at_every_pipeline(deep: Path, tmp_path: Path, ranks) -> None:
    assert_equal(deep, tmp_path, ranks, LAYOUTS)


def test_tied_embeddings(tmp_path: Path, ranks) -> None:
    """The first and the last stage hold the embedding; one rank writes it."""
    changes = {"hidden_size": 64, "num_hidden_layers": 4, "head_dim": 32, "intermediate_size": 128}
    source = save("qwen3", tmp_path / "source", tie_word_embeddings=True, **changes)
    layouts = [(4, {"pp": 2, "tp": 2, VIRTUAL: 2})]
    assert_equal(source, tmp_path / "out", ranks, layouts)


def assert_equal(source: Path, out: Path, ranks, layouts: Sequence[tuple[int, dict]]) -> None:
    """Weights are byte-equal; scales of inputs, which come from bf16 forwards, agree to 2%."""
    weights, calibrated = folder(WEIGHTS), folder(CALIBRATED)
    (measured,) = ranks(1, export_all, source, out / "one", {}, [WEIGHTS, CALIBRATED])
    one_cached, one = split_cache(tensors(out / "one" / calibrated))
    assert len(one_cached) == 8
    for number, (world, flags) in enumerate(layouts):
        directory = out / str(number)
        for found in ranks(world, export_all, source, directory, flags, [WEIGHTS, CALIBRATED]):
            assert found == pytest.approx(measured, rel=0.05), flags
        assert digests(directory / weights) == digests(out / "one" / weights), flags
        cached, rest = split_cache(tensors(directory / calibrated))
        assert_agree(rest, one)
        for name, scale in one_cached.items():
            torch.testing.assert_close(cached[name], scale, rtol=0.02, atol=0)


def split_cache(found: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """The scales of the KV cache, and all else."""
    cached = {n: t for n, t in found.items() if n.endswith(("k_scale", "v_scale"))}
    return cached, {n: t for n, t in found.items() if n not in cached}


def megatron_logits(path: Path, pipeline: Pipeline) -> torch.Tensor | None:
    from megatron_quant.ckpt.plan.ranks import Layout
    from megatron_quant.ckpt.read.directory import open_directory
    from megatron_quant.mcore.model.load import load_model
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.mcore.model.schedule import full_logits
    from megatron_quant.models import lookup, num_experts, num_layers

    checkpoint, groups = open_directory(path), start_distributed()
    architecture = lookup(checkpoint.config)
    params = architecture.params(checkpoint.config)
    stages = pipeline.stages(num_layers(params))
    layout = Layout.simulate(groups.size, 2, 1, 1, num_experts(params), stages)
    model = load_model(checkpoint, architecture, layout, groups, torch.float32, lambda steps: None)
    assert model.layout == layout
    with torch.no_grad():
        return full_logits(model.chunks, IDS, checkpoint.config["vocab_size"])


@pytest.mark.parametrize("name", ["qwen3_moe_mixed", "qwen3_tied"])
def test_logits_equal_transformers(name: str, tmp_path: Path, ranks) -> None:
    tiny.save(name, tmp_path)
    with torch.no_grad():
        expected = tiny.model(name)(IDS).logits
    first, second, *last = ranks(4, megatron_logits, tmp_path, Pipeline(2))
    assert first is second is None
    for logits in last:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def deal(config: dict, stages: Stages) -> Stages:
    """As Megatron deals the layers under the settings that this library makes of ``stages``."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_quant.ckpt.plan.ranks import Layout
    from megatron_quant.mcore.model.build import transformer_config
    from megatron_quant.models import lookup

    layout = Layout.simulate(len(stages), 1, 1, 1, stages=stages)
    settings = transformer_config(lookup(config), config, layout, torch.bfloat16)

    def layers(chunk: int, rank: int) -> tuple[int, ...]:
        start = get_transformer_layer_offset(settings, chunk, rank)
        return tuple(range(start, start + get_num_layers_to_build(settings, chunk, rank)))

    chunks = range(len(stages[0]))
    return tuple(tuple(layers(c, rank) for c in chunks) for rank in range(len(stages)))


def deals(config: dict, pipelines: list[Pipeline]) -> list[Stages]:
    return [deal(config, pipeline.stages(12)) for pipeline in pipelines]


def test_stages_are_megatrons(ranks) -> None:
    pipelines = [
        Pipeline(4),
        Pipeline(3, 2),
        Pipeline(4, first=1, last=3),
        Pipeline(2, first=5),
        Pipeline(3, 2, first=2, last=6),
        Pipeline(4, 2, last=6),
        Pipeline(2, 2, first=8, last=4),
    ]
    config = {**tiny.config("qwen3"), "num_hidden_layers": 12}
    (found,) = ranks(1, deals, config, pipelines)
    assert found == [pipeline.stages(12) for pipeline in pipelines]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"pp": 4}, "--pp 4 stages of 1 ranks or a multiple of them do not fill the world size 2"),
        ({"pp": 2, VIRTUAL: 4}, "rank 4 does not divide the 2 layers of a pipeline rank"),
    ],
)
def test_every_rank_refuses(deep: Path, tmp_path: Path, ranks, flags: dict, words: str) -> None:
    for error in ranks.errors(2, export_all, deep, tmp_path / "out", flags, [WEIGHTS]):
        assert isinstance(error, LayoutError) and words in str(error)
    assert not (tmp_path / "out").exists()
