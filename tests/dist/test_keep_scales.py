"""--keep-scales: a released checkpoint's codes and scales leave a live model bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import checkpoints
from tests.dist.command import quantize_argv, refused
from tests.dist.pool import Ranks
from tests.dist.test_layouts import PATIENCE_S
from tests.unit import exported
from tests.unit.test_dialects_transcode import with_groups

# (ranks, tp, ep, etp): at two an edge between shards is inside every group of 128 columns.
LAYOUTS = [(1, 1, 1, 1), (2, 2, 1, 2)]
# (source's dialect, format, recipe, dialects to go through)
ROUTES = [
    ("gptq", "int4", "int4", ("compressed-tensors", "gptq")),
    ("awq", "int4_asym", "int4_asym", ("compressed-tensors", "awq")),
    ("auto-round", "int8_group", "int8_group", ("compressed-tensors", "auto-round")),
    ("compressed-tensors", "fp8 weights", "fp8", ("compressed-tensors",)),
    ("fp8", "fp8_block", "fp8_block", ("compressed-tensors", "fp8")),
    ("modelopt", "nvfp4 weights", "w4a16_nvfp4", ("modelopt",)),
    ("compressed-tensors", "mxfp4 weights", "mxfp4", ("auto-round", "compressed-tensors")),
]


def _through(source: Path, out: Path, recipe: str, dialects: tuple[str, ...], *layout: int) -> None:
    from megatron_quant.runs.options import QuantizeOptions
    from megatron_quant.runs.megatron import quantize_run as quantize
    from megatron_quant.cli.console import ConsolePhases, console
    from megatron_quant.mcore.model.parallel import start_distributed

    groups, (tp, ep, etp) = start_distributed(), layout
    for step, dialect in enumerate(dialects):
        options = QuantizeOptions.from_flags(
            hf_model_id=str(source),
            export_quant_cfg=recipe,
            export_dir=out / str(step),
            export_format=dialect,
            tp=tp,
            ep=ep,
            etp=etp,
            weight_only=recipe != "fp8_block",
            keep_scales=True,
        )
        quantize(options, groups, ConsolePhases(console()))
        source = out / str(step)


def _all_through(out: Path, cases: list[tuple[Path, str, tuple[str, ...]]], *layout: int) -> None:
    for source, recipe, dialects in cases:
        _through(source, out / source.name, recipe, dialects, *layout)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str, tuple[str, ...]]]:
    folder = tmp_path_factory.mktemp("kept")
    return [(made(folder / str(i), *route[:2]), *route[2:]) for i, route in enumerate(ROUTES)]


def made(directory: Path, dialect: str, choice: str) -> Path:
    quant = exported.plan(choice)
    exported.export(directory, dialect, quant, exported.source_weights())
    exported.edit(directory, _as_others_write)
    checkpoints.tokenizer().save_pretrained(directory)
    return directory


def _as_others_write(tensors: exported.Tensors) -> None:
    """Integers with scales in fp16 that bf16 does not hold; no two tensors' FP8 scales alike."""
    for i, name in enumerate(sorted(tensors)):
        if name.endswith(".scales"):
            tensors[name] = tensors[name].half() * 1.0009765625
        elif name.endswith("weight_scale") and tensors[name].numel() == 1:
            tensors[name] *= 1 + i / 100


def stored(directory: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    tensors = {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}
    return {n: (t.dtype, t.flatten().view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trips_are_bit_exact(sources, tmp_path: Path, ranks: Ranks, layout) -> None:
    world, *parallelism = layout
    ranks(world, _all_through, tmp_path, sources, *parallelism, timeout=PATIENCE_S)
    for source, _, dialects in sources:
        found = stored(tmp_path / source.name / str(len(dialects) - 1))
        wanted = stored(source)
        assert found.keys() == wanted.keys(), source
        assert [n for n in wanted if found[n] != wanted[n]] == [], source


def _computed_with(path: Path, recipe: str, tp: int, etp: int) -> list[bool]:
    """Of each layer whether a changed weight is rounded onto the source's grid."""
    from megatron_quant.ckpt.read.scale_keeping import keeping
    from megatron_quant.ckpt.read.open import open_source
    from megatron_quant.mcore.model.keep import keep_scales
    from tests.dist import live

    model = live.load(path, live.Parallelism(tp=tp, etp=etp))
    attached = live.with_quantizers(model, recipe, weights_alone=True)
    _, kept = keeping(attached.plan, open_source(path))
    keep_scales(attached.layers, model, kept)
    found = []
    for layer in attached.layers:
        before = [w.detach().clone() for w in layer.weights()]
        with torch.no_grad():
            for weight in layer.weights():
                weight.mul_(1.001)  # less than half a step
        if layer.grouped:
            rounded = list(layer.module.quantize(torch.stack(layer.weights())))
        else:
            rounded = [layer.module.weight_quantizer(layer.weights()[0])]
        found += [torch.equal(r, w) for r, w in zip(rounded, before, strict=True)]
        torch.stack(rounded).sum().backward()
        found += [bool((w.grad == 1).all()) for w in layer.weights()]
    return found


def test_training_starts_on_the_grid(sources, ranks: Ranks) -> None:
    """Fake quant rounds onto the kept grid, and gradients pass."""
    gptq, recipe, _ = sources[0]
    for found in ranks(2, _computed_with, gptq, recipe, 2, 2):
        assert found and all(found)


# Refusals


def said_of(source: Path, ranks: Ranks, tmp_path: Path, **flags: object) -> str:
    flags = {"tp": 2, "ep": None, "keep_scales": True} | flags
    return refused(ranks, tmp_path, quantize_argv(source, tmp_path / "out", **flags))


def test_another_format(sources, tmp_path: Path, ranks: Ranks) -> None:
    said = said_of(sources[0][0], ranks, tmp_path, export_quant_cfg="nvfp4")
    assert "self_attn.o_proj is in int4 (group 128) weights without quantized inputs, whose" in said
    assert "scales do not fit nvfp4 weights" in said


def test_a_search(sources, tmp_path: Path, ranks: Ranks) -> None:
    flags = {"export_quant_cfg": "int4", "algorithm": "mse"}
    said = said_of(
        sources[0][0], ranks, tmp_path, export_format="compressed-tensors", **flags
    )
    assert "the recipe searches its scales (mse), which does not go with --keep" in said


def test_a_source_that_is_not_quantized(tmp_path: Path, ranks: Ranks) -> None:
    plain = exported.write(tmp_path / "plain", exported.source_weights())
    said = said_of(plain, ranks, tmp_path)
    assert said == f"{plain} has no scales to keep; leave out --keep-scales"


def spoiled(source: Path, to: Path, change) -> Path:
    to.mkdir()
    for file in source.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    exported.edit(to, change)
    return to


def test_permuted_columns(tmp_path: Path, ranks: Ranks) -> None:
    source, name = tmp_path / "permuted", "model.layers.0.self_attn.o_proj"
    exported.export(source, "gptq", with_groups("int4", 32), exported.source_weights())
    exported.edit(source, lambda t: t.update({f"{name}.g_idx": t[f"{name}.g_idx"].flip(0)}))
    recipe = tmp_path / "groups.yaml"
    recipe.write_text(
        'rules:\n  - quantize: ["*"]\n    weights: {format: int4, group_size: 32}\n'
    )
    flags = {"export_quant_cfg": recipe, "export_format": "compressed-tensors"}
    said = said_of(source, ranks, tmp_path, **flags)
    assert f"{name} has its columns in another order (g_idx)" in said


def test_unequal_tensor_scales_of_fused_weights(sources, tmp_path: Path, ranks: Ranks) -> None:
    name = "model.layers.0.self_attn.k_proj.weight_scale_2"
    source = spoiled(sources[5][0], tmp_path / "bad", lambda t: t[name].mul_(2))
    said = said_of(source, ranks, tmp_path, export_quant_cfg="w4a16_nvfp4")
    assert "k_proj have tensor scales" in said and "engines would use one for both" in said


def test_a_dtype_that_does_not_hold_the_grid(sources, tmp_path: Path, ranks: Ranks) -> None:
    said = said_of(sources[0][0], ranks, tmp_path, export_quant_cfg="int4", dtype="fp16")
    assert said.startswith("--keep-scales does not go with --dtype fp16")
