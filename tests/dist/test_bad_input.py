"""Flags, recipes and calibration data that cannot be used: one line, on every rank, nothing done.

Each refusal names the value and the way out, and leaves the file system as it was.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_quant.models.registry import ARCHITECTURES
from megatron_quant.recipes.load import recipe_names
from tests.dist import checkpoints
from tests.dist.command import command, copy, message, quantize_argv, refused, tree
from tests.dist.pool import Ranks

CALIBRATE: dict[str, Any] = {
    "weight_only": None,
    "calib_dataset": __file__,
    "calib_size": 4,
    "calib_seq_length": 32,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"))


def config_of(source: Path, to: Path, **changes: object) -> Path:
    """A copy whose config.json has ``changes``."""
    path = copy(source, to) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return to


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"hf_model_id": "/no/such"}, ["/no/such does not exist; give a checkpoint directory"]),
        ({"tp": 0}, ["--tp is 0: give at least 1"]),
        ({"tp": 4}, ["--tp 4 does not divide the world size 2; start a multiple of 4 ranks"]),
        ({"ep": 4}, ["--ep 4 x --etp 1 = 4 does not divide the world size 2; start a multiple"]),
        ({"ep": 1, "etp": 4}, ["--ep 1 x --etp 4 = 4 does not divide the world size 2; start"]),
        ({"ep": 2, "etp": 2}, ["--ep 2 x --etp 2 = 4 does not divide the world size 2; start"]),
        ({"tp": 3}, ["--tp 3 does not divide the attention heads (8); use one of 1, 2, 4, 8"]),
        ({"tp": 8}, ["--tp 8 does not divide the key-value heads (4); use one of 1, 2, 4"]),
        ({"ep": 3}, ["--ep 3 does not divide the experts of a layer (8); use one of 1, 2, 4, 8"]),
        ({"etp": 3}, ["--etp 3 does not divide the intermediate size of an expert (256); use"]),
        ({"export_quant_cfg": "fp9"}, ["config 'fp9'; choose one of", *recipe_names()]),
        ({"export_quant_cfg": "no.yaml"}, ["no.yaml does not exist", "give", *recipe_names()]),
        ({"export_dir": None}, ["--export-dir is missing: say where the checkpoint goes"]),
        ({"max_shard_size": "5XB"}, ["--max-shard-size '5XB' is no size: write it as 5GB"]),
        ({"max_shard_size": "0"}, ["--max-shard-size '0' is below one byte: give"]),
        ({"io_threads": 0}, ["--io-threads is 0: give at least 1"]),
        ({"resume": True, "overwrite": True}, ["--resume continues what --overwrite would remo"]),
        ({"export_dir": "/sys/out"}, ["/sys/out: cannot be used: ", "that you may write"]),
        ({"calib_size": 0}, ["--calib-size is 0: give at least 1"]),
        ({"eval_text": "/no/such.txt"}, ["/no/such.txt: not a readable UTF-8", "give another"]),
        ({"report": "/no/such/r.json"}, ["--report /no/such/r.json is in", "choose another file"]),
        ({"export_dir": "/dev/null/x"}, ["/dev/null/x: cannot be used: Not a directory; choose"]),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_flags(
    flags: dict[str, Any], words: list[str], source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    said = refused(ranks, tmp_path, quantize_argv(source, tmp_path / "out", **flags))
    assert [w for w in words if w not in said] == [], said


def test_a_choice_that_does_not_exist(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    argv = quantize_argv(source, tmp_path / "out", export_format="gguf")
    for ended in ranks(2, command, *argv):
        assert ended.status == 2
        last = ended.err.splitlines()[-1]
        assert "invalid choice: 'gguf'" in last
        assert "modelopt" in last and "compressed-tensors" in last
    assert tree(tmp_path) == {}


def test_an_unknown_architecture_lists_the_known(
    source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    other = config_of(source, tmp_path / "gpt2", architectures=["GPT2LMHeadModel"])
    said = refused(ranks, tmp_path, quantize_argv(other, tmp_path / "out"))
    assert "architectures=['GPT2LMHeadModel'] in config.json is not known; use" in said
    assert all(name in said for name in ARCHITECTURES)


def test_expert_parallelism_without_experts(ranks: Ranks, tmp_path: Path) -> None:
    dense = checkpoints.save("qwen3", tmp_path / "dense")
    said = refused(ranks, tmp_path, quantize_argv(dense, tmp_path / "out", ep=1, etp=2))
    assert said == "--ep 1 --etp 2: Qwen3ForCausalLM has no experts; leave both at 1"


def test_an_int4_word_that_tensor_parallelism_cuts(
    source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6}
    narrow = config_of(source, tmp_path / "narrow", **heads)
    weights = "{format: int4, group_size: channel}"
    (tmp_path / "int4.yaml").write_text(f"rules: [{{{ALL}, weights: {weights}}}]")
    recipe = {"export_quant_cfg": str(tmp_path / "int4.yaml"), "export_format": "gptq"}
    said = refused(ranks, tmp_path, quantize_argv(narrow, tmp_path / "out", **recipe))
    assert "o_proj.weight: --tp 2 cuts its 24 inputs among 8" in said
    assert "choose another --tp, or exclude the weight" in said


ALL = 'quantize: ["*mlp*", "*self_attn*"]'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('rules: [{quantise: ["*"], weights: fp8}]', "rule 1: unknown key quantise; allowed: "),
        (f"rulez: 1\nrules: [{{{ALL}, weights: fp8}}]", "unknown key rulez; allowed: description"),
        (
            f'rules: [{{{ALL}, weights: fp8}}, {{exclude: ["*vision*"]}}]',
            "rule 2 (*vision*): matches no weight of this model: correct the patterns or remove",
        ),
        (
            'rules: [{quantize: ["*mlp*"], weights: fp8}]',
            "says nothing about decoder.layers.0.self_attention.linear_proj.weight",
        ),
        ("rules: [", "is not valid YAML"),
        (f"rules: [{{{ALL}, weights: fp3}}]", "fp3"),
    ],
)
def test_recipes(text: str, words: str, source: Path, ranks: Ranks, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    argv = quantize_argv(source, tmp_path / "out", export_quant_cfg=recipe)
    said = refused(ranks, tmp_path, argv)
    assert str(recipe) in said
    assert words in said


def test_a_recipe_that_is_no_text(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_bytes(b"\xff\xfe\x00")
    argv = quantize_argv(source, tmp_path / "out", export_quant_cfg=recipe)
    assert "is not valid YAML" in refused(ranks, tmp_path, argv)


def test_a_directory_that_is_not_empty(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    said = refused(ranks, tmp_path, quantize_argv(source, tmp_path))
    assert said == f"{tmp_path} is not empty; pass --overwrite or choose another --export-dir"


def test_a_target_that_is_a_file(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    said = refused(ranks, tmp_path, quantize_argv(source, tmp_path / "out", overwrite=True))
    assert (
        "out: cannot be used: Not a directory; choose another --export-dir, one that is a dir"
        in said
    )


@pytest.mark.parametrize("overwrite", [None, True])
def test_exporting_onto_the_source(
    overwrite: bool | None, source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    mine = copy(source, tmp_path / "mine")
    for path in mine.glob("*token*"):  # nothing but weights and config
        path.unlink()
    (mine / "generation_config.json").unlink()
    said = refused(ranks, tmp_path, quantize_argv(mine, mine, overwrite=overwrite))
    assert said == f"--export-dir {mine} is the source checkpoint; choose another directory"


def test_calibration_without_a_tokenizer(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    bare = copy(source, tmp_path / "bare")
    for path in bare.glob("*token*"):
        path.unlink()
    said = refused(ranks, tmp_path, quantize_argv(bare, tmp_path / "out", **CALIBRATE))
    assert f"{bare}: no tokenizer that transformers can read; put the original model's" in said
    assert "or quantize with --weight-only" in said
    assert message(
        ranks(2, command, *quantize_argv(bare, tmp_path / "out", eval_text=__file__))
    ).startswith(f"{bare}: no tokenizer")


def test_a_broken_tokenizer(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    broken = copy(source, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    said = refused(ranks, tmp_path, quantize_argv(broken, tmp_path / "out", **CALIBRATE))
    assert said.startswith(f"{broken}: no tokenizer that transformers can read")


def test_a_tokenizer_of_another_model(ranks: Ranks, tmp_path: Path) -> None:
    small = checkpoints.save("qwen3_moe", tmp_path / "small", vocab_size=64, eos_token_id=0)
    said = refused(ranks, tmp_path, quantize_argv(small, tmp_path / "out", **CALIBRATE))
    assert re.search(r"tokenizer gives token \d+, but vocab_size in config.json is 64; use", said)


def test_too_little_text(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short " * 10)
    argv = quantize_argv(source, tmp_path / "out", **{**CALIBRATE, "calib_dataset": text})
    said = refused(ranks, tmp_path, argv)
    assert "has 3 samples of 32 tokens, but 4 are asked for: give more" in said
    argv = quantize_argv(source, tmp_path / "out", eval_text=text)
    assert "do not fill a window of 512" in refused(ranks, tmp_path, argv)


def test_calibration_text_that_is_not_there(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    flags = {**CALIBRATE, "calib_dataset": "/no/such.txt"}
    said = refused(ranks, tmp_path, quantize_argv(source, tmp_path / "out", **flags))
    assert said == "no calibration text file or folder '/no/such.txt': check the path"


def test_a_cold_expert(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    few = {**CALIBRATE, "calib_size": 1, "calib_seq_length": 2}  # 2 tokens x top 2 of 8 experts
    said = refused(ranks, tmp_path, quantize_argv(source, tmp_path / "out", **few))
    assert re.match(r"expert \d of decoder\.layers\.0\.mlp\.experts saw no calibration", said)
    assert "raise --calib-size, or take the layer's largest amax with --cold-experts" in said


def test_one_rank_that_sees_no_checkpoint(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    for blind in (0, 1):
        said = message(ranks(2, _blind, blind, source, tmp_path / "out", timeout=60))
        assert f"--hf-model-id is {'/no/such' if blind == 0 else source} on rank 0, " in said
    assert tree(tmp_path) == {}


def _blind(blind: int, source: Path, out: Path) -> object:
    """One rank has another file system than the others."""
    import torch.distributed as dist

    model = Path("/no/such") if dist.get_rank() == blind else source
    return command(*quantize_argv(model, out))
