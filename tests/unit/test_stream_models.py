"""Models without a table, streamed: every expert is there, with the values of its codes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_quant.ckpt.read.logical_tensors import plain_part, row_blocks
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.ckpt.write.manifest import MANIFEST
from megatron_quant.cli.console import ConsolePhases, console
from megatron_quant.dist import Groups
from megatron_quant.errors import ArchitectureError, QuantError
from megatron_quant.formats import fake_quant
from megatron_quant.formats.numbers.absmax import amax, tensor_scale
from megatron_quant.formats.spec import get_format
from megatron_quant.models.structure import recognise
from megatron_quant.runs.file_to_file import stream_files as stream
from megatron_quant.runs.options import QuantizeOptions
from tests.dist.command import command
from tests.unit import hf_models

WEIGHTS = "model.safetensors"
EXPERTS = {
    "gemma4": "model.language_model.layers.0.experts",
    "gemma4_text": "model.layers.0.experts",
    "qwen3_next": "model.layers.0.mlp.experts",
    "qwen3_5_moe": "model.layers.0.mlp.experts",
    "deepseek_v3": "model.layers.1.mlp.experts",
    "gpt_oss": "model.layers.0.mlp.experts",
    "llama4": "model.layers.1.feed_forward.experts",
    "glm4_moe": "model.layers.1.mlp.experts",
}
ROUTERS = {
    "gemma4": "model.language_model.layers.0.router.proj",
    "gemma4_text": "model.layers.0.router.proj",
    "qwen3_next": "model.layers.0.mlp.gate",
    "qwen3_5_moe": "model.layers.0.mlp.gate",
    "deepseek_v3": "model.layers.1.mlp.gate",
    "gpt_oss": "model.layers.0.mlp.router",
    "llama4": "model.layers.1.feed_forward.router",
    "glm4_moe": "model.layers.1.mlp.gate",
}
FUSED = {
    "gemma4": "model.language_model.layers.1.self_attn q_proj k_proj",  # without v_proj
    "gemma4_text": "model.layers.0.self_attn q_proj k_proj v_proj",
    "qwen3_next": "model.layers.0.mlp.shared_expert gate_proj up_proj",
    "qwen3_5_moe": "model.layers.0.linear_attn in_proj_qkv in_proj_z",
    "deepseek_v3": "model.layers.0.self_attn q_a_proj kv_a_proj_with_mqa",
    "gpt_oss": "model.layers.0.mlp.experts.1 gate_proj up_proj",
    "llama4": "model.layers.0.feed_forward gate_proj up_proj",
    "glm4_moe": "model.layers.1.mlp.shared_experts gate_proj up_proj",
}


@pytest.fixture(scope="module", params=list(hf_models.MODELS))
def model(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, hf_models.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory) -> Path:
    return hf_models.save("gemma4", tmp_path_factory.mktemp("gemma4"))


def run(source: Path, out: Path, **changes: object) -> Path:
    options = {"export_quant_cfg": "w4a16_nvfp4", "weight_only": True, **changes}
    stream(
        QuantizeOptions.from_flags(hf_model_id=str(source), export_dir=out, **options),
        Groups(),
        ConsolePhases(console()),
    )
    return out


def in_groups(directory: Path, name: str) -> str:
    """A recipe with groups of 32, which rows of these models fill."""
    path = directory / f"{name}.yaml"
    weights = f"{{format: {name}, group_size: 32}}"
    path.write_text(f"rules: [{{quantize: ['*'], weights: {weights}}}]")
    return str(path)


def experts_of(name: str, tensors: dict[str, torch.Tensor], expert: int) -> dict[str, torch.Tensor]:
    """gate, up and down of an expert, [N, K], as the model's own forward uses what is stored."""
    at = EXPERTS[name]
    if f"{at}.0.up_proj.weight" in tensors:
        return {p: tensors[f"{at}.{expert}.{p}_proj.weight"] for p in ("gate", "up", "down")}
    both, down = tensors[f"{at}.gate_up_proj"][expert], tensors[f"{at}.down_proj"][expert]
    if name == "gpt_oss":
        return {"gate": both[:, ::2].t(), "up": both[:, 1::2].t(), "down": down.t()}
    if name == "llama4":
        gate, up = both.chunk(2, 1)
        return {"gate": gate.t(), "up": up.t(), "down": down.t()}
    gate, up = both.chunk(2, 0)
    return {"gate": gate, "up": up, "down": down}


def test_decoded_experts_are_the_fake_quantized_ones(model, tmp_path: Path) -> None:
    name, source = model
    nvfp4 = get_format("nvfp4")
    tensors = load_file(source / WEIGHTS)
    stored = QuantizedCheckpoint(run(source, tmp_path / "out"))
    experts = [experts_of(name, tensors, e) for e in range(4)]
    for members in (("gate", "up"), ("down",)):
        scale = tensor_scale(
            torch.stack([amax(e[m]) for e in experts for m in members]).max(), nvfp4
        )
        for expert, weights in enumerate(experts):
            for member in members:
                at = f"{EXPERTS[name]}.{expert}.{member}_proj.weight"
                wanted = fake_quant(weights[member].contiguous(), nvfp4, scale)
                assert torch.equal(stored.weight(at, torch.bfloat16), wanted), at
    if name == "gpt_oss":
        bias = tensors[f"{EXPERTS[name]}.gate_up_proj_bias"]
        assert torch.equal(stored.raw(f"{EXPERTS[name]}.2.up_proj.bias"), bias[2, 1::2])


def test_the_export_verifies_and_says_what_is_excluded(model, tmp_path: Path) -> None:
    name, source = model
    for scales in ("shared", "per_expert"):
        out = run(source, tmp_path / scales, expert_scales=scales)
    report = verify(out, source)
    assert not report.problems
    assert sum(bool(t.format) for t in report.tensors if ".experts." in t.name) >= 12
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert ROUTERS[name] in config["ignore"] and "lm_head" in config["ignore"]
    assert not any(".experts." in module for module in config["ignore"])
    parent, *members = FUSED[name].split()
    weights = load_file(out / WEIGHTS)
    assert len({weights[f"{parent}.{m}.weight_scale_2"].item() for m in members}) == 1


@pytest.mark.parametrize("recipe", ["w4a16_nvfp4", "fp8_block", "int8_group", "mxfp4"])
def test_decoding_by_blocks_of_rows_is_decoding(
    gemma4: Path, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = in_groups(tmp_path, recipe) if recipe == "int8_group" else recipe
    out = run(gemma4, tmp_path / "out", export_quant_cfg=recipe, export_format="compressed-tensors")
    monkeypatch.setattr("megatron_quant.ckpt.read.logical_tensors._ROWS", 128)
    monkeypatch.setattr("megatron_quant.ckpt.read.logical_tensors._ELEMENTS", 1)
    stored = QuantizedCheckpoint(out)
    for name in stored:
        boxes = row_blocks(stored.shape(name))
        blocks = [plain_part(stored, name, box).to(torch.float32) for box in boxes]
        whole = stored.weight(name, torch.float32)
        assert torch.equal(torch.cat(blocks) if whole.dim() else blocks[0], whole), name
    embedding = "model.language_model.embed_tokens.weight"
    assert len(list(row_blocks(stored.shape(embedding)))) == 3


def test_towers_and_small_tensors_stay_as_they_are(gemma4: Path, tmp_path: Path) -> None:
    out = run(gemma4, tmp_path / "out")
    before, after = load_file(gemma4 / WEIGHTS), load_file(out / WEIGHTS)
    kept = [n for n in before if ".vision_tower." in n or ".router." in n or "embed" in n]
    assert len(kept) > 20 and all(torch.equal(before[n], after[n]) for n in kept)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    towers = {n.rpartition(".")[0] for n in kept if before[n].dim() == 2 and n.endswith(".weight")}
    assert towers <= set(config["ignore"])


def test_tensors_of_another_dtype_keep_it(gemma4: Path, tmp_path: Path) -> None:
    source = shutil.copytree(gemma4, tmp_path / "source")
    tensors = load_file(source / WEIGHTS)
    name = "model.language_model.layers.0.router.per_expert_scale"
    tensors[name] = tensors[name].float() + 1e-6
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    after = load_file(run(source, tmp_path / "out") / WEIGHTS)
    assert after[name].dtype == torch.float32 and torch.equal(after[name], tensors[name])


def test_an_export_is_rewritten_in_another_dialect(gemma4: Path, tmp_path: Path) -> None:
    int4 = in_groups(tmp_path, "int4")
    out = run(gemma4, tmp_path / "out", export_quant_cfg=int4, export_format="gptq")
    again = tmp_path / "again"
    argv = ["export", str(out), "--export-dir", str(again)]
    assert command(*argv, "--export-format", "compressed-tensors").status == 0
    direct = run(gemma4, tmp_path / "ct", export_quant_cfg=int4, export_format="compressed-tensors")
    for path in direct.iterdir():
        if path.name != MANIFEST:  # which says of what it was made
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def spoil(out: Path, **changes: torch.Tensor | None) -> Path:
    tensors = {**load_file(out / WEIGHTS), **changes}
    kept = {name: t for name, t in tensors.items() if t is not None}
    save_file(kept, out / WEIGHTS, metadata={"format": "pt"})
    index = out / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(kept, WEIGHTS)}))
    return out


def test_verify_finds_experts_that_were_left_out(gemma4: Path, tmp_path: Path) -> None:
    expert = f"{EXPERTS['gemma4']}.3"
    suffixes = ("weight", "weight_scale", "weight_scale_2")
    gone = {f"{expert}.{p}_proj.{s}": None for p in ("gate", "up", "down") for s in suffixes}
    plain = {
        n: torch.ones(64, 32).bfloat16() if n.endswith("down_proj.weight") else None
        for n in gone
        if "down" in n
    }
    out = run(gemma4, tmp_path / "out")
    for changes, said in [
        (gone, "experts: expert 3 is missing, config.json has 4 experts"),
        (plain, "experts.3.down_proj.weight: neither quantized nor in the ignore list"),
        ({f"{expert}.up_proj.weight": None}, "experts.3.up_proj.weight differs from that of"),
    ]:
        copy = shutil.copytree(out, tmp_path / str(len(list(tmp_path.iterdir()))))
        (problem, *_) = verify(spoil(copy, **changes)).problems
        assert said in problem, problem


SHAPES = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.router.weight": (2, 4),
    "model.layers.0.experts.gate_up_proj": (2, 6, 4),
    "model.layers.0.experts.down_proj": (2, 4, 3),
}
CONFIG = {"hidden_size": 4, "num_hidden_layers": 1, "num_experts": 2}
STRAYS = [
    ({"model.layers.0.experts.w4": (2, 4, 3)}, "looks like an expert, but no rule knows"),
    ({"model.layers.0.moe.expert_bank": (2, 4, 3)}, "looks like an expert, but no rule knows"),
    ({"model.layers.0.experts.gate_up_proj": (2, 4, 6)}, r"\[experts, features, hidden\] is known"),
    ({"model.layers.0.router.weight": None}, "has experts but no router"),
    (
        {"model.layers.0.experts.gate_up_proj": None, "model.layers.0.experts.down_proj": None},
        "has a router but no experts",
    ),
    ({"model.layers.0.experts.2.up_proj.weight": (3, 4)}, "3 are there, config.json has 2"),
    ({"model.layers.0.experts.down_proj": None}, "has the linears gate_proj, up_proj; known are"),
    ({"model.embed_tokens.weight": None}, "no tensor is called embed_tokens.weight"),
]


@pytest.mark.parametrize(("changes", "said"), STRAYS)
def test_what_may_be_an_expert_is_never_skipped(changes: dict, said: str) -> None:
    shapes = {n: s for n, s in {**SHAPES, **changes}.items() if s is not None}
    with pytest.raises(ArchitectureError, match=said):
        recognise(CONFIG, shapes)


def test_the_count_of_experts_and_layers_is_the_configs() -> None:
    assert len(recognise(CONFIG, SHAPES).views) == 6
    with pytest.raises(ArchitectureError, match=r"expert 2 is missing, config.json has 3"):
        recognise({**CONFIG, "num_experts": 3}, SHAPES)
    with pytest.raises(ArchitectureError, match=r"layer 1 \(model.layers.1\) has no tensor"):
        recognise({**CONFIG, "num_hidden_layers": 2}, SHAPES)
    with pytest.raises(ArchitectureError, match="has no 'num_hidden_layers'"):
        recognise({"hidden_size": 4}, SHAPES)


def test_layers_beyond_the_models_are_never_quantized() -> None:
    draft = {n.replace("layers.0", "layers.1"): s for n, s in SHAPES.items() if "layers" in n}
    params = recognise(CONFIG, {**SHAPES, **draft}).params
    assert {p.role.value for p in params if p.layer == 1} == {"token prediction"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tp": 2}, "--tp 2 does not go with --stream: .* leave one of them out"),
        ({"ep": 2, "pp": 2}, "--ep 2 --pp 2 does not go with --stream"),
        ({"eval_text": Path("x")}, "run megatron-quant eval"),
        ({"act_percentile": 99.0}, "--act-percentile"),
        ({"megatron_load_path": Path("x")}, "x holds no distributed checkpoint"),
        ({"megatron_save_path": Path("x")}, "^--megatron-save-path needs a Megatron model"),
    ],
)
def test_flags_that_need_a_model_are_refused(gemma4: Path, tmp_path, flags, said) -> None:
    with pytest.raises(QuantError, match=said):
        run(gemma4, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_nan_in_a_weight_is_named(gemma4: Path, tmp_path: Path) -> None:
    source = shutil.copytree(gemma4, tmp_path / "source")
    tensors = load_file(source / WEIGHTS)
    tensors[f"{EXPERTS['gemma4']}.down_proj"][2, 1, 1] = torch.nan
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(QuantError, match=r"experts.2.down_proj.weight has NaN or Inf"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_neither_megatron_nor_modelopt_is_imported(gemma4: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from megatron_quant.cli.main import main\n"
        f"status = main(['quantize', '--stream', '--hf-model-id', {str(gemma4)!r}, "
        f"'--export-quant-cfg', 'mxfp8', '--dry-run'])\n"
        "heavy = {'megatron', 'transformer_engine', 'modelopt', 'transformers'}\n"
        "sys.exit(status or sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "experts.{0..3}.down_proj.weight" in done.stdout


# What vLLM 0.32 matches, from `fused_moe_make_expert_params_mapping` and `stacked_params_mapping`.
VLLM_EXPERT = re.compile(r".*\.experts\.\d+\.(gate_proj|up_proj|down_proj)\.(\w+)")
VLLM_PARAMETERS = {
    "modelopt": {"weight", "weight_scale", "weight_scale_2", "input_scale"},
    "compressed-tensors": {"weight_packed", "weight_scale", "weight_global_scale"},
}
"""Dialect -> what its NVFP4 method for mixtures of experts loads into parameters."""


@pytest.mark.parametrize("dialect", list(VLLM_PARAMETERS))
def test_experts_have_the_names_that_vllm_matches(model, dialect: str, tmp_path: Path) -> None:
    name, source = model
    flags = {"export_format": dialect, "serve_engine": "vllm"}
    if name == "gpt_oss":
        with pytest.raises(QuantError, match="loads this model's experts as stacks alone"):
            run(source, tmp_path / "out", **flags)
        return
    experts = [
        n
        for n in QuantizedCheckpoint(run(source, tmp_path / "out", **flags)).tensors
        if ".experts." in n
    ]
    found = [VLLM_EXPERT.fullmatch(n) for n in experts]
    assert experts and all(found)
    assert {m[2] for m in found if m} <= VLLM_PARAMETERS[dialect]
