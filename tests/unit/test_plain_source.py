"""Training checkpoints by Hugging Face names: all values, and what is said of another model's."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_quant.ckpt.read import Weights, check_weights, open_source
from megatron_quant.ckpt.storage import read_config
from megatron_quant.errors import CheckpointError
from megatron_quant.mcore.checkpoint import PlainWeights, open_plain, open_torch_dist
from megatron_quant.models import Box, Role, lookup, whole
from tests.unit import plain_world, tiny

LAYERS, EXPERTS = 2, 4
NAMES = ["qwen3_moe", "qwen2_moe", "gpt_oss", "qwen3_tied", "llama", "deepseek_v3"]
NAMES += ["qwen3_next", "qwen3_5_moe"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny.save(name, tmp_path_factory.mktemp(name)) for name in NAMES}


def opened(folder: Path, hf: Path, *skip: str) -> PlainWeights:
    return open_plain(open_torch_dist(folder).without(skip), read_config(hf))


def assert_same(found: Weights, hf: Path) -> None:
    wanted = open_source(hf)
    params = lookup(wanted.config).params(wanted.config)
    names = {source.name: source.shape for param in params for source in param.sources}
    assert set(found) == set(names)
    check_weights(found, params)
    for name, shape in names.items():
        box = whole(shape)
        value = wanted.read(name, box).to(found.info(name).dtype)
        if name.endswith("linear_attn.norm.weight"):
            value = value - 1 + 1  # Megatron has it less one, and so it was saved
        assert torch.equal(found.read(name, box), value), name


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_one_key_each(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = plain_world.delta_nets_apart(folders[name])
    for form in (plain_world.apart, plain_world.of_fsdp):
        path = plain_world.write(tmp_path / form.__name__, form(tensors), form is plain_world.apart)
        assert_same(opened(path, folders[name]), folders[name])


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "llama"])
def test_every_value_of_stacks(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = plain_world.stacked(plain_world.tensors_of(folders[name]), LAYERS, EXPERTS)
    assert len(tensors["decoder.layers.self_attention.linear_proj.weight"]) == LAYERS
    assert_same(opened(plain_world.write(tmp_path / "run", tensors), folders[name]), folders[name])


def test_delta_nets_of_one_tensor_and_boxes_of_them(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    hf = folders["qwen3_next"]
    wanted = open_source(hf)
    for number, tensors in enumerate(
        (plain_world.tensors_of(hf), plain_world.delta_nets_apart(hf))
    ):
        found = opened(plain_world.write(tmp_path / f"{number}", tensors), hf)
        assert_same(found, hf)
        for leaf, box in (
            ("in_proj_qkvz", Box((20, 3), (90, 7))),  # of three key heads
            ("in_proj_ba", Box((3, 0), (9, 32))),
            ("conv1d", Box((20, 0, 1), (70, 1, 2))),
        ):
            name = f"model.layers.0.linear_attn.{leaf}.weight"
            assert torch.equal(found.read(name, box), wanted.read(name, box)), leaf


def test_a_box_of_a_tensor(folders: dict[str, Path], tmp_path: Path) -> None:
    """Rows of several query groups, columns, and one half of gate and up."""
    hf = folders["qwen3_moe"]
    tensors = plain_world.stacked(plain_world.tensors_of(hf), LAYERS, EXPERTS)
    found, wanted = opened(plain_world.write(tmp_path / "run", tensors), hf), open_source(hf)
    for name, box in (
        ("model.layers.1.self_attn.q_proj.weight", Box((5, 3), (40, 7))),
        ("model.layers.1.mlp.experts.3.up_proj.weight", Box((2, 0), (9, 32))),
        ("model.embed_tokens.weight", Box((49, 0), (1, 32))),
        ("model.norm.weight", Box((1,), (30,))),
    ):
        assert torch.equal(found.read(name, box), wanted.read(name, box))


def test_keys_of_other_specs_and_what_lies_beside(folders: dict[str, Path], tmp_path: Path) -> None:
    hf = folders["llama"]
    tensors = {
        key.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.").replace(
            ".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."
        ): tensor
        for key, tensor in plain_world.tensors_of(hf).items()
    }
    tensors |= {key: torch.ones(2) for key in BESIDE}
    found = opened(plain_world.write(tmp_path / "run", tensors), hf)
    assert_same(found, hf)


BESIDE = (
    "optimizer.state.exp_avg.embedding.word_embeddings.weight",
    "chained_0.optimizer.state.fp32_param.decoder.layers.0.mlp.linear_fc1.weight",
    "rng_state",
    "opt_param_scheduler.num_steps",
    "decoder.layers.0.mlp.linear_fc1._extra_state",
    "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1",
)


def test_a_vocabulary_that_is_padded(folders: dict[str, Path], tmp_path: Path) -> None:
    hf = folders["llama"]
    tensors = plain_world.tensors_of(hf)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[key] = torch.cat([tensors[key], torch.full((78, 32), torch.nan)])
    assert_same(opened(plain_world.write(tmp_path / "run", tensors), hf), hf)


def test_an_output_layer_wins_over_a_tied_config(folders: dict[str, Path], tmp_path: Path) -> None:
    hf = folders["qwen3_tied"]
    tensors = {**plain_world.tensors_of(hf), "output_layer.weight": torch.ones(50, 32)}
    found = opened(plain_world.write(tmp_path / "run", tensors), hf)
    assert found.config["tie_word_embeddings"] is False
    assert torch.equal(found.read("lm_head.weight", whole((50, 32))), torch.ones(50, 32))


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def without(*parts: str) -> Change:
    return lambda tensors: {k: t for k, t in tensors.items() if not any(p in k for p in parts)}


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {re.sub(old, new, k): t for k, t in tensors.items()}


def added(key: str, *shape: int) -> Change:
    return lambda tensors: {**tensors, key: torch.ones(shape)}


FC1 = "decoder.layers.1.mlp.experts.experts.2.linear_fc1.weight"
ERRORS: list[tuple[str, Change, str]] = [
    (
        "qwen2_moe",
        without("shared_experts"),
        "the config has a shared expert, the checkpoint has not",
    ),
    (
        "qwen3_moe",
        added("decoder.layers.0.mlp.shared_experts.linear_fc2.weight", 3),
        r"the checkpoint has a shared expert \(decoder.layers.0.mlp.shared_experts.linear_fc2.*\), "
        "the config has not: .* --skip-keys",
    ),
    ("llama", without("output_layer"), "the config has an output layer that is not the embedding"),
    (
        "qwen3_moe",
        without("q_layernorm", "k_layernorm"),
        "the config has norms of queries and keys",
    ),
    (
        "qwen3_moe",
        without("layers.1."),
        "has 1 layers, config.json 2: give the config.json of this",
    ),
    ("qwen3_moe", without("experts.3."), "has 3 experts a layer, config.json 4: give the"),
    (
        "qwen3_moe",
        without(f"{FC1}_v"),
        r"has no decoder.layers.1.mlp.experts.linear_fc1.weight2 \(1 m",
    ),
    (
        "qwen3_next",
        without("in_proj", "conv1d"),
        "the config has gated delta nets, the checkpoint has not",
    ),
    (
        "qwen3_moe",
        without("embedding."),
        "no key that ends with embedding.word_embeddings.weight: g",
    ),
    (
        "qwen3_moe",
        added("ema.embedding.word_embeddings.weight", 3),
        r"has two models, .* leave one out with --skip-keys 'ema\.\*'",
    ),
    (
        "qwen3_moe",
        added("vision_model.patch.weight", 3),
        r"has vision_model.patch.weight \(1 such\), which .* or leave it out with --skip-keys "
        r"'vision_model\.\*'",
    ),
    (
        "qwen3_moe",
        added("decoder.layers.1.mlp.router.noise", 3),
        r"--skip-keys 'decoder.layers.1.mlp.router.noise'",
    ),
    (
        "qwen3_moe",
        added("mtp.layers.0.enorm.weight", 3),
        r"the checkpoint has layers for specul.*\(mtp",
    ),
    (
        "qwen3_moe",
        added("decoder.final_layernorm.weight", 31),
        r"decoder.final_layernorm.weight is \[31\], and config.json makes it \[32\]: give",
    ),
    (
        "llama",
        added("embedding.word_embeddings.weight", 49, 32),
        r"embedding.word_embeddings.weight is \[49, 32\], and config.json makes it \[50, 32\]",
    ),
]


@pytest.mark.parametrize(("name", "change", "words"), ERRORS)
def test_another_model(
    name: str, change: Change, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors = change(plain_world.apart(plain_world.tensors_of(folders[name])))
    path = plain_world.write(tmp_path / "run", tensors)
    with pytest.raises(CheckpointError, match=words) as caught:
        opened(path, folders[name])
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_keys_that_are_skipped(folders: dict[str, Path], tmp_path: Path) -> None:
    hf = folders["qwen3_moe"]
    tensors = plain_world.apart(plain_world.tensors_of(hf))
    tensors |= {"mtp.layers.0.enorm.weight": torch.ones(3), "ema.a": torch.ones(3)}
    assert_same(opened(plain_world.write(tmp_path / "run", tensors), hf, "mtp.*", "ema.*"), hf)


def test_layers_for_speculation(folders: dict[str, Path], tmp_path: Path) -> None:
    """Under their Hugging Face names; the embedding and the output layer are the model's own."""
    hf = tmp_path / "hf"
    hf.mkdir()
    config = json.loads((folders["deepseek_v3"] / "config.json").read_text())
    config["num_nextn_predict_layers"] = 2
    (hf / "config.json").write_text(json.dumps(config))
    tensors = plain_world.tensors_of(folders["deepseek_v3"])
    own, layers = lookup(config), config["num_hidden_layers"]
    made = {}
    for param in own.drafts(config, 2):
        if param.role not in (Role.EMBEDDING, Role.OUTPUT):
            made[param.name] = torch.randn(param.shape)
    path = plain_world.write(tmp_path / "run", plain_world.apart({**tensors, **made}))
    found = opened(path, hf)
    first, second = (f"model.layers.{layers + i}" for i in range(2))
    for name, key in (
        (f"{first}.eh_proj.weight", "mtp.layers.0.eh_proj.weight"),
        (f"{second}.enorm.weight", "mtp.layers.1.enorm.weight"),
        (f"{second}.shared_head.norm.weight", "mtp.layers.1.final_layernorm.weight"),
        (
            f"{second}.mlp.experts.3.down_proj.weight",
            "mtp.layers.1.transformer_layer.mlp.experts.linear_fc2.weight3",
        ),
    ):
        assert torch.equal(found.read(name, whole(made[key].shape)), made[key])
    for name, key in (
        (f"{first}.embed_tokens.weight", "embedding.word_embeddings.weight"),
        (f"{second}.shared_head.head.weight", "output_layer.weight"),
    ):
        assert torch.equal(found.read(name, whole(tensors[key].shape)), tensors[key])
    unsaid = {**config, "num_nextn_predict_layers": 0}
    (hf / "config.json").write_text(json.dumps(unsaid))
    with pytest.raises(
        CheckpointError, match=r"layers for speculation \(mtp\) .*the config has not"
    ):
        opened(path, hf)


def test_weights_in_fp8(folders: dict[str, Path], tmp_path: Path) -> None:
    """Codes without their scales are no weights."""
    hf, key = folders["llama"], "decoder.layers.1.mlp.linear_fc2.weight"
    tensors = plain_world.tensors_of(hf)
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    found = opened(plain_world.write(tmp_path / "run", tensors), hf)
    params = lookup(found.config).params(found.config)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.weight is stored as torch"):
        check_weights(found, params)


def test_rows_in_an_order_that_nothing_says(folders: dict[str, Path], tmp_path: Path) -> None:
    """torch_dcp keeps gate and up in one tensor, as a tensor-parallel rank has them."""
    hf = folders["qwen3_moe"]
    path = plain_world.write(tmp_path / "run", plain_world.tensors_of(hf), metadata=False)
    with pytest.raises(CheckpointError, match=r"linear_fc1.weight0 has the rows of gate and up in"):
        opened(path, hf)
    hf = folders["qwen3_next"]
    tensors = plain_world.tensors_of(hf)
    path = plain_world.write(tmp_path / "deltas", tensors, metadata=False)
    with pytest.raises(CheckpointError, match=r"in_proj.weight has the rows of query and k"):
        opened(path, hf)


def test_layers_of_another_model_are_not_counted(folders: dict[str, Path], tmp_path: Path) -> None:
    hf, key = folders["llama"], "vision_model.decoder.layers.7.mlp.experts.experts.9.a"
    tensors = {**plain_world.tensors_of(hf), key: torch.ones(1)}
    path = plain_world.write(tmp_path / "run", tensors)
    assert_same(opened(path, hf, "vision_model.*"), hf)
    with pytest.raises(CheckpointError, match=r"vision_model.* --skip-keys"):
        opened(path, hf)
