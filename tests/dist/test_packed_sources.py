"""A packed source, from its slices to exports, at several layouts."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.dist import packed
from tests.dist.command import WEIGHTS, copy, quantize_argv, refused
from tests.dist.pool import Ranks
from tests.dist.test_layouts import PATIENCE_S, digests, export_all, folder

# (ranks, tp, ep, etp)
LAYOUTS = [(1, 1, 1, 1), (2, 2, 1, 2), (4, 4, 1, 4)]
CASES = [
    {"export_quant_cfg": "nvfp4", "export_format": "modelopt", "weight_only": True},
    {"export_quant_cfg": "int4", "export_format": "gptq", "weight_only": True},
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return packed.save(tmp_path_factory.mktemp("gptq"))


def _logits(path: Path, ids: torch.Tensor, tp: int, ep: int, etp: int) -> torch.Tensor:
    from megatron_quant.mcore.model.schedule import full_logits
    from tests.dist import live

    model = live.load(path, live.Parallelism(tp, ep, etp), torch.float32)
    router = model.module.get_parameter("decoder.layers.0.mlp.router.weight")
    assert router.dtype == torch.float32 and router.shape == (8, 128)
    with torch.no_grad():
        return full_logits(model.module, ids, 258).clone()


def test_logits_are_those_of_the_decoded_weights(sources, ranks: Ranks) -> None:
    """Every tensor of both is exact in fp32."""
    gptq, decoded = sources
    ids = (torch.arange(2 * 15) * 7 % 258).view(2, 15)
    reference = transformers.AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(ids).logits
    for world, *parallelism in LAYOUTS:
        for logits in ranks(world, _logits, gptq, ids, *parallelism, timeout=PATIENCE_S):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_exports_are_those_of_the_decoded_weights(sources, tmp_path: Path, ranks: Ranks) -> None:
    gptq, decoded = sources
    ranks(1, export_all, decoded, tmp_path / "decoded", 1, 1, 1, CASES, timeout=PATIENCE_S)
    for world, *parallelism in LAYOUTS:
        out = tmp_path / str(world)
        ranks(world, export_all, gptq, out, *parallelism, CASES, timeout=PATIENCE_S)
        for case in CASES:
            found, wanted = (digests(d / folder(case)) for d in (out, tmp_path / "decoded"))
            assert found.keys() == wanted.keys()
            assert all(found[n] == wanted[n] for n in found if n.endswith(".safetensors"))
            config = json.loads((out / folder(case) / "config.json").read_text())
            assert config["dtype"] == "bfloat16"
            assert config["quantization_config"]["quant_method"] == case["export_format"]


# Bad input


def changed(source: Path, to: Path, **changes: torch.Tensor | None) -> Path:
    return copy(source, to, **changes)


def reconfigured(source: Path, to: Path, **settings: object) -> Path:
    copy(source, to)
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] |= settings
    (to / "config.json").write_text(json.dumps(config))
    return to


def said_of(bad: Path, ranks: Ranks, tmp_path: Path) -> str:
    said = refused(ranks, tmp_path, quantize_argv(bad, tmp_path / "out"))
    assert said.startswith(f"{bad}: ")
    return said.removeprefix(f"{bad}: ")


def test_codes_without_scales(sources, ranks: Ranks, tmp_path: Path) -> None:
    bad = changed(sources[0], tmp_path / "bad", **{f"{packed.DOWN}.scales": None})
    assert said_of(bad, ranks, tmp_path) == (
        f"no tensor {packed.DOWN}.scales, though config.json says that {packed.DOWN} is int4; "
        "fetch the checkpoint again"
    )


@pytest.mark.parametrize("value", [6, -1])
def test_a_group_that_there_is_not(
    value: int, sources, ranks: Ranks, tmp_path: Path
) -> None:
    name = f"{packed.DOWN}.g_idx"
    index = (torch.arange(704) // 128).to(torch.int32)
    index[-1] = value  # of the last shard alone
    bad = changed(sources[0], tmp_path / "bad", **{name: index})
    assert said_of(bad, ranks, tmp_path) == (
        f"{name} holds {value}, but the weight has groups 0 to 5; fetch the checkpoint again"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq' in config.json is not read; known: modelopt"),
        ({"bits": 3}, "quantization_config: bits=3 with sym=True is not read; known: 4 and 8"),
        ({"group_size": 64}, "weight [128, 704] in groups of 64; correct quantization_config"),
        ({"checkpoint_format": "gptq_v2"}, "qzeros does not fit the config and the shape"),
        ({"checkpoint_format": "exl2"}, "gptq checkpoint_format 'exl2' is not read; known: gptq,"),
    ],
)
def test_configs(
    settings: dict[str, object], message: str, sources, ranks: Ranks, tmp_path: Path
) -> None:
    bad = reconfigured(sources[0], tmp_path / "bad", **settings)
    said = refused(ranks, tmp_path, quantize_argv(bad, tmp_path / "out"))
    assert message in said


def test_more_bits_than_are_there(sources, ranks: Ranks, tmp_path: Path) -> None:
    bad = reconfigured(sources[0], tmp_path / "bad", bits=8)
    said = refused(ranks, tmp_path, quantize_argv(bad, tmp_path / "out"))
    assert "but the config means" in said and "for a int8_group weight" in said


def test_scales_that_are_not_finite(sources, ranks: Ranks, tmp_path: Path) -> None:
    name = f"{packed.DOWN}.scales"
    bad = changed(sources[0], tmp_path / "bad", **{name: torch.full((6, 128), torch.inf).half()})
    assert said_of(bad, ranks, tmp_path) == (
        f"{packed.DOWN}.weight has NaN or Inf; repair the checkpoint or fetch it again"
    )


def test_a_bias_of_zeros_is_no_tensor_of_the_model(sources, ranks: Ranks, tmp_path: Path) -> None:
    """Some packers add one to every linear."""
    bias = f"{packed.DOWN}.bias"
    changed(sources[0], tmp_path / "zeros", **{bias: torch.zeros(128)})
    (logits,) = ranks(1, _logits, tmp_path / "zeros", torch.arange(4)[None], 1, 1, 1)
    assert logits.isfinite().all()
    bad = changed(sources[0], tmp_path / "bad", **{bias: torch.ones(128)})
    assert f"{bias} (1 such) is no tensor of the architecture" in said_of(bad, ranks, tmp_path)
