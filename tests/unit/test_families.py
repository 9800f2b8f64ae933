"""Every family, from the names that the hub has to an export that engines read."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_quant.ckpt.verify import verify
from megatron_quant.errors import CheckpointError
from megatron_quant.evaluation import decoded
from megatron_quant.models import has_plain_router
from tests.dist import checkpoints
from tests.dist.checkpoints import tokenizer
from tests.unit import family_models, sources
from tests.unit.family_models import FAMILIES, Tiny


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory) -> tuple[str, Tiny, Path, Path]:
    """Name, facts, source and its export in compressed-tensors' FP8."""
    name, directory = request.param, tmp_path_factory.mktemp(request.param)
    source, out = family_models.save(name, directory / "source"), directory / "out"
    sources.run(source, out)
    return name, FAMILIES[name], source, out


def ignored(out: Path) -> list[str]:
    return sources.config(out)["quantization_config"]["ignore"]


def test_all_experts_are_quantized_and_what_engines_keep_is_listed(family) -> None:
    _, tiny, source, out = family
    report = verify(out, source)
    assert not report.problems
    quantized = {t.name.removesuffix(".weight") for t in report.tensors if t.format}
    for expert in range(tiny.count[1]):
        for leaf in tiny.leaves:
            assert f"{tiny.experts}.{expert}.{leaf}" in quantized
    listed = ignored(out)
    for module in (tiny.router, *tiny.dense):
        assert module in listed and module not in quantized
    assert not any(re.search(r"(^|layers\.\d+)$", name) for name in listed)  # no whole layer


def test_config_json_is_the_sources_with_quantization_config_alone(family) -> None:
    _, _, source, out = family
    before, after = sources.config(source), sources.config(out)
    del after["quantization_config"]
    assert after == before


def test_modelopts_nvfp4_verifies_too(family, tmp_path: Path) -> None:
    _, tiny, source, _ = family
    out = tmp_path / "out"
    sources.run(source, out, export_quant_cfg="w4a16_nvfp4", export_format="modelopt")
    report = verify(out, source)
    assert not report.problems
    formats = {t.name: t.format for t in report.tensors}
    assert formats[f"{tiny.experts}.1.{tiny.leaves[0]}.weight"] == "nvfp4"


def test_what_is_not_quantized_keeps_its_bytes(family) -> None:
    _, _, source, out = family
    before, after = sources.tensors(source), sources.tensors(out)
    kept = [
        n for n in before if n in after and f"{n.removesuffix('.weight')}.weight_scale" not in after
    ]
    assert len(kept) > 5
    for name in kept:
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name])


def test_input_scales_come_from_transformers_forward(family, tmp_path: Path) -> None:
    name, tiny, source, _ = family
    tokenizer().save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    flags = {"export_quant_cfg": "fp8", "export_format": "modelopt", "weight_only": False}
    flags |= {"calib_dataset": str(text), "calib_size": 4, "calib_seq_length": 32}
    out = tmp_path / "out"
    if tiny.unmeasured:
        with pytest.raises(CheckpointError, match="--weight-only"):
            sources.run(source, out, cold_experts="layer-max", **flags)
        return
    run = sources.run(source, out, cold_experts="layer-max", **flags)
    assert run.inputs is not None and run.inputs.found
    found = sources.tensors(out)
    scaled = [n.removesuffix("_scale") for n in found if n.endswith(".weight_scale")]
    assert f"{tiny.experts}.0.{tiny.leaves[-1]}.weight" in scaled
    for weight in scaled:
        assert found[f"{weight.removesuffix('.weight')}.input_scale"] > 0
    if name not in family_models.PARTIAL:  # eval runs the export, its inputs quantized
        ids = torch.arange(20)
        said, expected = (decoded(d, torch.float32)(ids) for d in (out, source))
        assert 0 < (said - expected).norm() / expected.norm() < 0.3


def test_the_page_has_the_table_of_these_tests() -> None:
    page = Path(__file__).parents[2] / "docs" / "architectures.md"
    assert family_models.table() in page.read_text()


def spoiled(out: Path, to: Path, **changes: torch.Tensor | None) -> Path:
    shutil.copytree(out, to)
    found = {**sources.tensors(out), **changes}
    for file in to.glob("*.safetensors"):
        file.unlink()
    kept = {n: w for n, w in found.items() if w is not None}
    sources.write(to, kept)
    sources.index(to, {sources.WEIGHTS: kept})
    return to


def faults(out: Path, tiny: Tiny) -> dict[str, dict[str, torch.Tensor | None]]:
    """By what is wrong: tensors that an export in FP8 then has instead; None for those it lacks."""
    tensors, last = sources.tensors(out), tiny.count[1] - 1
    of_experts = {
        e: [n for n in tensors if n.startswith(f"{tiny.experts}.{e}.")] for e in (1, last)
    }
    down, router = f"{tiny.experts}.0.{tiny.leaves[-1]}.weight", f"{tiny.router}.weight"
    return {
        "middle": dict.fromkeys(of_experts[1]),
        "last": dict.fromkeys(of_experts[last]),
        "turned": {down: tensors[down].t().contiguous()},
        "router": {
            router: tensors[router].to(torch.float8_e4m3fn),
            f"{tiny.router}.weight_scale": torch.ones(tensors[router].shape[0], 1),
        },
    }


TABLED = {
    name: (experts, router)
    for name, experts, router in (
        ("qwen3_moe", "model.layers.0.mlp.experts", "model.layers.0.mlp.gate"),
        ("qwen2_moe", "model.layers.0.mlp.experts", "model.layers.0.mlp.gate"),
        ("deepseek_v3", "model.layers.1.mlp.experts", "model.layers.1.mlp.gate"),
    )
}


@pytest.mark.parametrize("name", TABLED)
def test_verify_refuses_the_same_of_models_with_a_table(name: str, tmp_path: Path) -> None:
    source, out = checkpoints.save(name, tmp_path / "source"), tmp_path / "out"
    sources.run(source, out)
    experts, router = TABLED[name]
    numbers = {
        int(n.removeprefix(f"{experts}.").split(".")[0])
        for n in sources.tensors(out)
        if n.startswith(f"{experts}.")
    }
    tiny = replace(FAMILIES["glm4_moe"], experts=experts, router=router, count=("", len(numbers)))
    for what, changes in faults(out, tiny).items():
        broken = spoiled(out, tmp_path / what, **changes)
        assert verify(broken).problems and verify(broken, source).problems, what


def test_verify_refuses_what_is_missing_turned_or_wrongly_quantized(family, tmp_path: Path) -> None:
    _, tiny, source, out = family
    for what, changes in faults(out, tiny).items():
        broken = spoiled(out, tmp_path / what, **changes)
        assert verify(broken).problems and verify(broken, source).problems, what
    unlisted = tmp_path / "unlisted"
    shutil.copytree(tmp_path / "router", unlisted)
    config = sources.config(unlisted)
    config["quantization_config"]["ignore"].remove(tiny.router)
    (unlisted / "config.json").write_text(json.dumps(config))
    found = [problem for problem in verify(unlisted).problems if tiny.router in problem]
    if has_plain_router(config):
        assert len(found) == 1 and "quantized, though it is a router" in found[0]
    else:  # vLLM builds it as it is stored
        assert found == []
