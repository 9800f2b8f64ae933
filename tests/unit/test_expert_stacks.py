"""gpt-oss as engines read it: one stack a layer, in MXFP4 or plain, whatever the source has."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as t

from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify import verify
from megatron_quant.cli.console import ConsolePhases, console
from megatron_quant.dist import Groups
from megatron_quant.errors import FormatError
from megatron_quant.formats import decode, encode
from megatron_quant.formats.spec import get_format
from megatron_quant.runs.conversion import ExportOptions, reexport
from tests.unit import hf_models, sources

STACK = "model.layers.0.mlp.experts"
GPT_OSS = {"export_quant_cfg": "gpt_oss", "export_format": "mxfp4"}
ENGINES = ("vllm", "sglang", "transformers")
MXFP4 = get_format("mxfp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense, released (the same values in MXFP4), and out (what is made of dense)."""
    directory = tmp_path_factory.mktemp("gpt_oss")
    hf_models.save_gpt_oss(directory)
    sources.run(directory / "dense", directory / "out", serve_engine="vllm", **GPT_OSS)
    return directory


def loaded(directory: Path, **more: object) -> dict[str, torch.Tensor]:
    model = t.GptOssForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **more)
    return dict(model.state_dict())


def in_mxfp4(stack: torch.Tensor) -> torch.Tensor:
    """Values of a plain stack [E, K, N] in MXFP4, which groups inputs."""
    rows = [encode(w.t().contiguous(), MXFP4, None) for w in stack]
    return torch.stack([decode(f, MXFP4, torch.bfloat16).t() for f in rows])


def test_transformers_own_class_loads_what_was_written(folder: Path) -> None:
    dense = loaded(folder / "dense")
    found = loaded(folder / "out", quantization_config=t.Mxfp4Config(dequantize=True))
    assert found.keys() == dense.keys()
    stacks = [n for n in dense if n.endswith(("gate_up_proj", "down_proj"))]
    assert len(stacks) == 4
    for name, value in dense.items():
        assert torch.equal(found[name], in_mxfp4(value) if name in stacks else value), name


def test_names_shapes_and_config_are_the_releases(folder: Path) -> None:
    found, released = (sources.tensors(folder / d) for d in ("out", "released"))
    assert {n: (w.shape, w.dtype) for n, w in found.items()} == {
        n: (w.shape, w.dtype) for n, w in released.items()
    }
    said = sources.config(folder / "out")["quantization_config"]
    assert said["quant_method"] == "mxfp4" and said.keys() == {
        "quant_method",
        "modules_to_not_convert",
    }
    listed = said["modules_to_not_convert"]
    assert {"model.layers.1.mlp.router", "model.layers.0.self_attn.o_proj", "lm_head"} <= set(
        listed
    )
    assert not any("experts" in name for name in listed)


def test_verify_reads_stacks(folder: Path) -> None:
    report = verify(folder / "out", folder / "dense")
    assert not report.problems
    quantized = [check for check in report.tensors if check.format == "mxfp4"]
    assert len(quantized) == 2 * 4 * 3 and all(c.error is not None for c in quantized)
    assert not verify(folder / "released", folder / "dense").problems


def test_mxfp4_stays_mxfp4_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    before = sources.tensors(folder / "released")
    sources.run(folder / "released", tmp_path / "kept", keep_scales=True, **GPT_OSS)
    to_singles(folder / "released", tmp_path / "singles")
    transcoded = {"again": tmp_path / "singles", "same": folder / "released"}
    for name, source in transcoded.items():
        exported(source, tmp_path / name, "mxfp4")
    for name in ("kept", *transcoded):
        after = sources.tensors(tmp_path / name)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n], w) for n, w in before.items()), name


def exported(source: Path, out: Path, dialect: str) -> None:
    options = ExportOptions(source=source, export_dir=out, export_format=dialect)
    reexport(options, Groups(), ConsolePhases(console()))


def to_singles(source: Path, out: Path) -> None:
    exported(source, out, "compressed-tensors")
    assert f"{STACK}.3.up_proj.weight_packed" in sources.tensors(out)


def test_without_kept_scales_no_value_moves(folder: Path, tmp_path: Path) -> None:
    sources.run(folder / "released", tmp_path / "out", **GPT_OSS)
    before, after = QuantizedCheckpoint(folder / "released"), QuantizedCheckpoint(tmp_path / "out")
    for module in before.modules:
        name = f"{module}.weight"
        assert torch.equal(after.weight(name, torch.float32), before.weight(name, torch.float32))


def test_released_experts_become_nvfp4_exactly(folder: Path, tmp_path: Path) -> None:
    flags = {"export_quant_cfg": "nvfp4_experts_only", "export_format": "modelopt"}
    flags |= {"weight_only": True, "keep_scales": True}
    sources.run(folder / "released", tmp_path / "out", **flags)
    name = f"{STACK}.2.up_proj.weight"
    found = [QuantizedCheckpoint(d) for d in (folder / "released", tmp_path / "out")]
    assert found[1].modules[f"{STACK}.2.up_proj"].weights.name == "nvfp4"
    assert torch.equal(*(c.weight(name, torch.float32) for c in found))


ATTENTION = """
rules:
  - {quantize: ["*self_attn*"], weights: fp8_channel, inputs: fp8_channel}
  - exclude: ["*"]
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_plain_experts_stay_stacks_beside_quantized_attention(
    engine: str, folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "attention.yaml"
    recipe.write_text(ATTENTION)
    flags = {"export_quant_cfg": str(recipe), "weight_only": False, "serve_engine": engine}
    sources.run(folder / "dense", tmp_path / "out", **flags)
    before, after = (sources.tensors(d) for d in (folder / "dense", tmp_path / "out"))
    for name in [n for n in before if ".experts." in n]:
        assert torch.equal(after[name], before[name]), name
    assert not any(".experts.0." in n for n in after)
    assert (
        f"{STACK}.0.gate_proj" in sources.config(tmp_path / "out")["quantization_config"]["ignore"]
    )
    assert not verify(tmp_path / "out", folder / "dense").problems


def test_a_plain_stack_can_be_made_of_a_packed_one(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "attention.yaml"
    recipe.write_text(ATTENTION)
    flags = {"export_quant_cfg": str(recipe), "weight_only": False}
    sources.run(folder / "released", tmp_path / "out", **flags)
    before, after = (sources.tensors(d) for d in (folder / "dense", tmp_path / "out"))
    for name in [n for n in before if ".experts." in n]:
        assert torch.equal(after[name], before[name]), name


def spoiled(out: Path, to: Path, change: Callable[[sources.Tensors], None]) -> Path:
    shutil.copytree(out, to)
    sources.edit(to, change)
    sources.index(to, {sources.WEIGHTS: sources.tensors(to)})
    return to


def less(name: str) -> Callable[[sources.Tensors], None]:
    def change(found: sources.Tensors) -> None:
        for n in [n for n in found if n.startswith(f"{STACK}.{name}")]:
            found[n] = found[n][:-1]

    return change


def turned(found: sources.Tensors) -> None:
    name = f"{STACK}.down_proj_blocks"
    found[name] = found[name].transpose(1, 2).contiguous()


def nan(found: sources.Tensors) -> None:
    found[f"{STACK}.down_proj_scales"][1, 5, 0] = 255


def gone(found: sources.Tensors) -> None:
    del found[f"{STACK}.gate_up_proj_scales"]


def coded_router(found: sources.Tensors) -> None:
    name = STACK.replace("experts", "router")
    found[f"{name}.weight"] = found[f"{name}.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (coded_router, r"mlp\.router\.weight: dtype is torch.float8_e4m3fn"),
        (less("down_proj"), r"experts\.3\.down_proj"),
        (less(""), r"experts\.3\.gate_proj"),
        (turned, r"down_proj_scales is torch.uint8 .*, but .*down_proj_blocks needs torch.uint8"),
        (nan, r"experts\.1\.down_proj\.weight_scales: holds the E8M0 code 255"),
        (gone, r"gate_up_proj_scales is missing"),
    ],
)
def test_verify_refuses_a_stack_that_is_not_whole(
    change: Callable, said: str, folder: Path, tmp_path: Path
) -> None:
    found = verify(spoiled(folder / "out", tmp_path / "out", change)).problems
    assert found and any(re.search(said, line) for line in found), found


@pytest.mark.parametrize("engine", ENGINES)
def test_quantized_single_experts_are_refused_where_stacks_alone_are_loaded(
    engine: str, folder: Path, tmp_path: Path
) -> None:
    flags = {"export_quant_cfg": "mxfp4", "export_format": "compressed-tensors"}
    with pytest.raises(FormatError, match=r"stacks alone.*--export-format mxfp4"):
        sources.run(folder / "dense", tmp_path / "out", serve_engine=engine, **flags)
    sources.run(folder / "dense", tmp_path / "out", **flags)


def test_what_is_not_gpt_oss_has_no_stacks_in_mxfp4(tmp_path: Path) -> None:
    source = hf_models.save("glm4_moe", tmp_path / "source")
    with pytest.raises(FormatError, match=r"gpt-oss's alone; take --export-format compressed"):
        sources.run(source, tmp_path / "out", **GPT_OSS)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("[{quantize: ['*'], weights: mxfp4}]", "mxfp4 export has no mxfp4 .* outside experts"),
        (
            "[{quantize: ['*.experts.*'], weights: nvfp4}, {exclude: ['*']}]",
            "no nvfp4 weights .* in experts",
        ),
        (
            "[{quantize: ['*.0.mlp.experts.*'], weights: mxfp4}, {exclude: ['*']}]",
            r"layers\.1\.mlp\.experts\.0\.\w+ is left alone, but engines read the experts of every",
        ),
    ],
)
def test_what_stacks_cannot_say_is_refused(
    rules: str, said: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(f"rules: {rules}\n")
    flags = {**GPT_OSS, "export_quant_cfg": str(tmp_path / "mine.yaml")}
    with pytest.raises(FormatError, match=said):
        sources.run(folder / "dense", tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_the_hubs_own_patterns_leave_attention_alone(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder / "released", tmp_path / "hub")
    names = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    said = {"quant_method": "mxfp4", "modules_to_not_convert": names}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    assert QuantizedCheckpoint(source).modules == QuantizedCheckpoint(folder / "released").modules
    assert not verify(source).problems
