"""Families through Megatron-Core: at TP x EP x ETP and in a pipeline, the bytes of ``--stream``."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_layouts import digests, folder, tensors
from tests.dist.test_mixtures import export_all
from tests.dist.test_stream import stream_all

# Inner sizes that end inside 128 x 128 blocks where tp and etp cut them.
_FFN = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 192,
    "moe_intermediate_size": 192,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
}
_DELTA = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 192,
    "num_experts": 4,
}
SIZES = {
    "glm4_moe": {**_FFN, "attention_bias": True, "use_qk_norm": True},
    "glm4_moe_lite": _FFN,
    "dots1": {**_FFN, "first_k_dense_replace": 1},
    "hy_v3": {**_FFN, "num_experts": 4},
    "qwen3_next": {**_DELTA, "mlp_only_layers": [0]},
    "qwen3_5_moe": _DELTA,
    "kimi_k25": {**_FFN, "n_group": 2, "topk_group": 1},
}
CASES = [
    {"export_quant_cfg": "nvfp4_mse", "expert_scales": "per_expert", "weight_only": True},
    {"export_quant_cfg": "fp8_block", "export_format": "fp8"},
]
LAYOUTS = [{"tp": 2, "ep": 2, "etp": 2}, {"tp": 2, "ep": 2, "pp": 2}]


TOWER = {
    "vision_tower.patch_embed.proj.weight": torch.arange(96.0).view(2, 3, 4, 4),
    "vision_tower.encoder.blocks.0.wqkv.weight": torch.ones(96, 32, dtype=torch.bfloat16),
    "mm_projector.proj.0.bias": torch.ones(32, dtype=torch.bfloat16),
}


def kimi_k25(directory: Path, **sizes: object) -> Path:
    """DeepSeek-V3 as Kimi-K2.5's text decoder, with some tensors of its tower."""
    checkpoints.save("deepseek_v3", directory, **sizes)
    config = json.loads((directory / "config.json").read_text())
    beside = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25"}
    text = {k: v for k, v in config.items() if k not in beside}
    found = {**beside, "text_config": {**text, "model_type": "kimi_k2"}}
    (directory / "config.json").write_text(json.dumps(found))
    weights = directory / "model.safetensors"
    decoder = {f"language_model.{n}": w for n, w in load_file(weights).items()}
    save_file({**decoder, **TOWER}, weights, metadata={"format": "pt"})
    return directory


def saved(name: str, directory: Path) -> Path:
    sizes = SIZES[name]
    return (kimi_k25 if name == "kimi_k25" else partial(checkpoints.save, name))(directory, **sizes)


def test_towers_keep_every_byte(tmp_path: Path, ranks: Ranks) -> None:
    source = saved("kimi_k25", tmp_path / "source")
    flags, case = {"pp": 2, "calib_size": 2, "calib_seq_length": 16}, {"export_quant_cfg": "fp8"}
    ranks(2, export_all, source, tmp_path, flags | {"cold_experts": "layer-max"}, [case])
    found = tensors(tmp_path / folder(case))
    for name, tower in TOWER.items():
        assert found[name].dtype is tower.dtype and torch.equal(found[name], tower)
    config = json.loads((tmp_path / folder(case) / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert "vision_tower.encoder.blocks.0.wqkv" in ignored
    assert found["language_model.model.layers.1.self_attn.q_b_proj.input_scale"] > 0


# (model, key of config.json, tensors of its layer for speculation)
DRAFTS = [
    (
        "qwen3_5_moe",
        "mtp_num_hidden_layers",
        {"mtp.fc.weight": (64, 128), "mtp.layers.0.mlp.experts.gate_up_proj": (4, 128, 64)},
    ),
    (
        "glm4_moe",
        "num_nextn_predict_layers",
        {"model.layers.2.eh_proj.weight": (64, 128), "model.layers.2.enorm.weight": (64,)},
    ),
]


@pytest.mark.parametrize(("name", "key", "shapes"), DRAFTS)
def test_layers_for_speculation_are_carried(
    name: str, key: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path, ranks: Ranks
) -> None:
    source = saved(name, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: 1}))
    drafts = {n: torch.rand(s).bfloat16() for n, s in shapes.items()}
    weights = source / "model.safetensors"
    save_file({**load_file(weights), **drafts}, weights, metadata={"format": "pt"})
    ranks(1, stream_all, source, tmp_path / "stream", CASES[1:])
    ranks(2, export_all, source, tmp_path, {"tp": 2}, CASES[1:])
    out = tmp_path / folder(CASES[1])
    assert digests(out) == digests(tmp_path / "stream" / folder(CASES[1]))
    found = tensors(out)
    for draft, value in drafts.items():
        assert torch.equal(found[draft], value)


@pytest.mark.parametrize("name", SIZES)
def test_every_layout_writes_what_a_stream_writes(name: str, tmp_path: Path, ranks: Ranks) -> None:
    source = saved(name, tmp_path / "source")
    ranks(1, stream_all, source, tmp_path / "stream", CASES)
    for number, flags in enumerate(LAYOUTS):
        out = tmp_path / str(number)
        ranks(4, export_all, source, out, flags, CASES)
        for case in CASES:
            expected = digests(tmp_path / "stream" / folder(case))
            assert len(expected) > 4 and digests(out / folder(case)) == expected, (flags, case)
