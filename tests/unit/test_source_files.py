"""Files beside a checkpoint's index and weights are carried, or named."""

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_quant.ckpt.read.directory import open_directory
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.ckpt.write.carried import beside
from megatron_quant.cli.console import ConsolePhases, console
from megatron_quant.dist import Groups
from megatron_quant.runs.conversion import ExportOptions, reexport
from tests.dist import checkpoints
from tests.unit import hf_models, sources
from tests.unit.sources import WEIGHTS

MTP = {
    "model.layers.2.eh_proj.weight": torch.arange(128 * 256).view(128, 256).bfloat16(),
    "model.layers.2.enorm.weight": torch.linspace(0, 1, 128),
}


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path / "source")


def test_an_index_that_names_model_safetensors_is_followed(moe: Path, tmp_path: Path) -> None:
    extra = {"mtp.fc.weight": torch.ones(128, 256).bfloat16()}
    sources.write(moe, extra, "model_extra_tensors.safetensors")
    names = sources.tensors(moe).keys() - extra.keys()
    sources.index(moe, {WEIGHTS: names, "model_extra_tensors.safetensors": extra})
    sources.run(moe, tmp_path / "out")
    assert torch.equal(sources.tensors(tmp_path / "out")["mtp.fc.weight"], extra["mtp.fc.weight"])
    config = sources.config(tmp_path / "out")["quantization_config"]
    assert any("mtp.fc" in name or "fc" in name for name in config["ignore"])


def test_one_file_is_taken_beside_others_that_nothing_names(moe: Path) -> None:
    names = set(sources.tensors(moe))
    sources.write(moe, {"layers.0.w1": torch.ones(2, 2)}, "consolidated.safetensors")
    checkpoint = open_directory(moe)
    assert set(checkpoint.tensors) == names
    assert checkpoint.unread == ("consolidated.safetensors",)


def test_token_prediction_beside_the_index_is_carried(moe: Path, tmp_path: Path) -> None:
    sources.write(moe, MTP, "mtp.safetensors")
    sources.write(moe, {"base.lora_A.weight": torch.ones(2, 2)}, "adapter_model.safetensors")
    sources.config(moe, num_nextn_predict_layers=1)
    found = sources.run(moe, tmp_path / "out")
    out = sources.tensors(tmp_path / "out")
    for name, tensor in MTP.items():
        assert out[name].dtype == tensor.dtype and torch.equal(out[name], tensor), name
    config = sources.config(tmp_path / "out")
    assert config["num_nextn_predict_layers"] == 1
    assert "model.layers.2.eh_proj" in config["quantization_config"]["ignore"]
    assert found.left_out == ("adapter_model.safetensors: weights that nothing names",)


def test_the_config_counts_no_layers_that_the_files_lack(moe: Path, tmp_path: Path) -> None:
    sources.config(moe, num_nextn_predict_layers=1)
    found = sources.run(moe, tmp_path / "out")
    assert sources.config(tmp_path / "out")["num_nextn_predict_layers"] == 0
    (line,) = found.left_out
    assert "num_nextn_predict_layers is 0 in config.json" in line


def test_a_lost_layer_for_speculation_is_seen(moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sources.run(moe, out)
    sources.write(moe, MTP, "mtp.safetensors")
    sources.config(moe, num_nextn_predict_layers=1)
    assert not verify(out, moe).problems  # it says that it has none
    sources.config(out, num_nextn_predict_layers=1)
    problems = verify(out, moe).problems
    assert len(problems) == 2 and all("model.layers.2." in p and "has it" in p for p in problems)


def test_carried_stacks_are_on_the_ignore_list(tmp_path: Path) -> None:
    source = hf_models.save("qwen3_5_moe", tmp_path / "source")
    stacks = {
        "mtp.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 64, 64).bfloat16(),
        "mtp.layers.0.mlp.experts.down_proj": torch.ones(4, 64, 32).bfloat16(),
    }
    sources.edit(source, lambda t: {**t, **stacks})
    for dialect in ("modelopt", "compressed-tensors"):
        sources.run(
            source, tmp_path / dialect, export_quant_cfg="w4a16_nvfp4", export_format=dialect
        )
        ignored = sources.config(tmp_path / dialect)["quantization_config"]["ignore"]
        assert "mtp.layers.0.mlp.experts" in ignored, dialect
        assert not any("conv1d" in name for name in ignored), dialect


FILES = (
    *("tokenization_odd.py", "tekken.json", "qwen.tiktoken", "tokenizer.model.v3", "modules.json"),
    *("LICENSE", "README.md", "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json"),
)
NOT = (
    *("config.json", "quant_config.json", "hf_quant_config.json", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", ".gitattributes", "__pycache__/a.pyc"),
)


def put(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")


def test_all_files_but_weights_and_what_says_how_they_are_stored(tmp_path: Path) -> None:
    put(tmp_path, *FILES, *NOT, "original/consolidated.pth", "original/params.json")
    found = beside(tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in found.carried} == set(FILES)
    assert found.left_out == ("original/: a folder with weights of its own (consolidated.pth)",)


def test_links_are_followed_within_the_source_and_the_hubs_cache_alone(tmp_path: Path) -> None:
    source, secret = tmp_path / "cache" / "snapshots" / "1", tmp_path / "secret"
    put(tmp_path, "secret", "cache/blobs/abc", "cache/snapshots/1/a.json", "elsewhere/b.json")
    os.symlink(secret, source / "notes.txt")
    os.symlink("../../blobs/abc", source / "tokenizer.json")
    os.symlink("a.json", source / "b.json")
    os.symlink(tmp_path / "elsewhere", source / "folder")
    os.symlink(tmp_path / "elsewhere" / "b.json", source / "c.json")
    os.mkfifo(source / "fifo.txt")
    found = beside(source)
    assert [p.name for p in found.carried] == ["a.json", "b.json", "tokenizer.json"]
    assert [line.partition(":")[0] for line in found.left_out] == [
        *("c.json", "fifo.txt", "folder/", "notes.txt"),
    ]


def test_an_export_has_them_in_their_folders(moe: Path, tmp_path: Path) -> None:
    put(moe, *FILES)
    out = tmp_path / "out"
    sources.run(moe, out)
    assert all((out / name).read_text() == "{}" for name in FILES)
    sources.run(moe, out, overwrite=True)
    sources.run(moe, out, resume=True)
    assert all((out / name).read_text() == "{}" for name in FILES)
    assert not list(out.rglob("*.partial"))


def test_a_statement_nested_in_the_config_is_found_and_none_stays(tmp_path: Path) -> None:
    source = hf_models.save("gemma4", tmp_path / "source")
    first = tmp_path / "first"
    sources.run(source, first)
    config = json.loads((first / "config.json").read_text())
    statement = config.pop("quantization_config")
    for key in ("quantization_config", "compression_config"):
        text = {**config["text_config"], key: statement}
        (first / "config.json").write_text(json.dumps({**config, "text_config": text}))
        name = "model.language_model.layers.0.experts.1.up_proj"
        assert name in QuantizedCheckpoint(first).modules
        sources.run(first, tmp_path / key, export_quant_cfg="mxfp4")
        again = sources.config(tmp_path / key)
        assert again["quantization_config"]["format"] == "mxfp4-pack-quantized"
        assert key not in again["text_config"]


def test_an_fp8_layer_for_speculation_is_rewritten_with_its_scales(tmp_path: Path) -> None:
    source = hf_models.save("deepseek_v3", tmp_path / "source")
    first, out = tmp_path / "first", tmp_path / "out"
    fp8 = {"export_quant_cfg": "fp8_block", "export_format": "fp8", "weight_only": False}
    sources.run(source, first, **fp8)
    name, scale = "model.layers.2.eh_proj.weight", torch.tensor([[0.5]])
    codes = torch.ones(64, 128).to(torch.float8_e4m3fn)
    sources.edit(first, lambda t: {**t, name: codes, f"{name}_scale_inv": scale})
    sources.index(first, {WEIGHTS: sources.tensors(first)})
    sources.config(first, num_nextn_predict_layers=1)
    reexport(
        ExportOptions(source=first, export_dir=out, export_format="compressed-tensors"),
        Groups(),
        ConsolePhases(console()),
    )
    found = sources.tensors(out)
    assert torch.equal(found[name].float(), codes.float())
    assert torch.equal(found[f"{name}_scale"], scale)
    assert "model.layers.2.eh_proj" in QuantizedCheckpoint(out).modules
    assert not verify(out, first).problems
