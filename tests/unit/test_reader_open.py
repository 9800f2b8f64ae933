"""Opening and reading checkpoints, good and bad."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_quant.ckpt.read.checks import check_weights
from megatron_quant.ckpt.read.directory import INDEX, open_directory
from megatron_quant.ckpt.read.source import TensorInfo, fill
from megatron_quant.ckpt.storage.safetensors_header import WEIGHTS
from megatron_quant.errors import CheckpointError
from megatron_quant.models import Box, Copy, Source, copies, local_shape, lookup
from tests.unit import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("qwen3", tmp_path_factory.mktemp("single"))


@pytest.fixture
def single(saved: Path, tmp_path: Path) -> Path:
    """A copy of a one-file checkpoint, to be spoiled."""
    for file in ("config.json", WEIGHTS):
        (tmp_path / file).write_bytes((saved / file).read_bytes())
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tiny.save("qwen3", tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def _change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(directory / WEIGHTS), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / WEIGHTS)


def _change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _check(directory: Path) -> tuple[str, ...]:
    checkpoint = open_directory(directory)
    return check_weights(checkpoint, lookup(checkpoint.config).params(checkpoint.config))


def _assert_refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        _check(directory)
    assert "\n" not in str(caught.value)


def test_headers_of_one_file(saved: Path) -> None:
    checkpoint = open_directory(saved)
    assert checkpoint.config["architectures"] == ["Qwen3ForCausalLM"]
    assert checkpoint.tensors["lm_head.weight"] == TensorInfo(torch.float32, (50, 32), WEIGHTS)


def test_a_sharded_checkpoint_reads_as_one_file(saved: Path, sharded: Path) -> None:
    one, many = open_directory(saved), open_directory(sharded)
    assert set(one.tensors) == set(many.tensors)
    for name, info in one.tensors.items():
        box = Box((0,) * len(info.shape), info.shape)
        assert torch.equal(one.read(name, box), many.read(name, box))
    assert _check(sharded) == ()


def test_one_file_wins_over_an_index(single: Path) -> None:
    (single / INDEX).write_text("no JSON")
    assert _check(single) == ()


def test_a_single_file_may_have_another_name(single: Path) -> None:
    (single / WEIGHTS).rename(single / "weights.safetensors")
    assert _check(single) == ()


@pytest.mark.parametrize("box", [Box((3, 4), (5, 6)), Box((49, 0), (1, 32)), Box((0, 31), (50, 1))])
def test_read_gives_the_rectangle(saved: Path, box: Box) -> None:
    whole = load_file(saved / WEIGHTS)["lm_head.weight"]
    assert torch.equal(open_directory(saved).read("lm_head.weight", box), whole[box.index])


def test_read_takes_a_run_of_a_vector(saved: Path) -> None:
    whole = load_file(saved / WEIGHTS)["model.norm.weight"]
    part = open_directory(saved).read("model.norm.weight", Box((8,), (16,)))
    assert torch.equal(part, whole[8:24])


def _resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_slice_does_not_load_its_tensor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(8192, 2048)}, tmp_path / WEIGHTS)  # 64 MiB
    checkpoint = open_directory(tmp_path)
    before = _resident_kib()
    checkpoint.read("w", Box((100, 0), (16, 2048))).clone()
    assert _resident_kib() - before < 16 * 1024


def test_fill_places_casts_and_leaves_the_rest(saved: Path) -> None:
    checkpoint = open_directory(saved)
    params = {p.name: p for p in lookup(checkpoint.config).params(checkpoint.config)}
    param = params["embedding.word_embeddings.weight"]
    whole = load_file(saved / WEIGHTS)["model.embed_tokens.weight"]
    local = torch.nn.Parameter(torch.full(local_shape(param, 3, 4), 7.0, dtype=torch.bfloat16))
    fill(local, copies(param, 3, 4), checkpoint)
    assert torch.equal(local[:11], whole[39:].bfloat16())
    assert (local[11:] == 7).all()
    assert local.requires_grad and local.grad_fn is None


def test_fill_reads_several_tensors(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    names = ("model.norm.weight", "model.layers.0.input_layernorm.weight")
    parts = [
        Copy(Source(name, (32,)), Box((0,), (4,)), Box((4 * i,), (4,)))
        for i, name in enumerate(names)
    ]
    local = torch.zeros(8)
    fill(local, parts, open_directory(saved))
    assert torch.equal(local, torch.cat([tensors[name][:4] for name in names]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weight_dtypes(single: Path, dtype: torch.dtype) -> None:
    _change_tensors(single, **{k: v.to(dtype) for k, v in load_file(single / WEIGHTS).items()})
    assert _check(single) == ()


def test_buffers_of_old_versions_are_listed_as_ignored(single: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _change_tensors(single, **{name: torch.ones(4, dtype=torch.float64)})
    assert _check(single) == (name,)


def test_a_tied_output_layer_is_ignored(single: Path) -> None:
    _change_json(single / "config.json", tie_word_embeddings=True)
    assert _check(single) == ("lm_head.weight",)


def test_a_missing_directory(tmp_path: Path) -> None:
    _assert_refused(tmp_path / "nowhere", "nowhere does not exist; give a checkpoint directory")


def test_no_config(single: Path) -> None:
    (single / "config.json").unlink()
    _assert_refused(single, r"config\.json does not exist")


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "holds no JSON object but list"), ("{", "cannot be read as JSON"), ("\xff", "JSON")],
)
def test_a_config_that_is_no_object(single: Path, text: str, message: str) -> None:
    (single / "config.json").write_bytes(text.encode("latin-1"))
    _assert_refused(single, rf"config\.json .*{message}")


def test_no_weights(single: Path) -> None:
    (single / WEIGHTS).unlink()
    _assert_refused(single, r"has no model\.safetensors; give a checkpoint with safetensors")


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_with_the_way_out(single: Path, pickle: str) -> None:
    (single / WEIGHTS).rename(single / pickle)
    _assert_refused(single, rf"only pickled weights \({pickle}\).*save_pretrained")


def test_several_files_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    _assert_refused(sharded, rf"safetensors files and no {INDEX}")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(single: Path, keep: int) -> None:
    (single / WEIGHTS).write_bytes((single / WEIGHTS).read_bytes()[:keep])
    _assert_refused(single, rf"{WEIGHTS} is truncated or no safetensors file .*fetch it again")


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    last = sorted(sharded.glob("model-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    _assert_refused(sharded, f"{last.name} is truncated")


def test_no_safetensors_file_at_all(single: Path) -> None:
    (single / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    _assert_refused(single, "is truncated or no safetensors file")


def test_an_index_that_names_a_missing_file(sharded: Path) -> None:
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    first.unlink()
    _assert_refused(sharded, rf"{first.name} is missing, though {INDEX} names it")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", 3])
def test_an_index_that_leaves_its_directory(sharded: Path, file: Any) -> None:
    _change_json(sharded / INDEX, weight_map={"lm_head.weight": file})
    _assert_refused(sharded, "is no file name in its directory")


@pytest.mark.parametrize("weight_map", [None, [], {}])
def test_an_index_without_a_map(sharded: Path, weight_map: Any) -> None:
    _change_json(sharded / INDEX, weight_map=weight_map)
    _assert_refused(sharded, f"{INDEX} has no weight_map")


def test_an_index_that_names_a_missing_tensor(sharded: Path) -> None:
    where = json.loads((sharded / INDEX).read_text())["weight_map"]
    _change_json(sharded / INDEX, weight_map={**where, "other": where["lm_head.weight"]})
    _assert_refused(sharded, f"tensor other is missing, though {INDEX} names it")


def test_a_missing_tensor(single: Path) -> None:
    _change_tensors(single, **{"model.norm.weight": None})
    _assert_refused(single, r"tensor model\.norm\.weight is missing")


def test_an_unexpected_tensor(single: Path) -> None:
    _change_tensors(single, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)})
    _assert_refused(single, r"q_proj\.bias \(1 such\) is no tensor of the architecture")


def test_a_wrong_shape(single: Path) -> None:
    _change_tensors(single, **{"model.norm.weight": torch.zeros(31)})
    _assert_refused(single, r"model\.norm\.weight has shape \[31\], but .* asks for \[32\]")


def test_a_dtype_that_is_no_weight(single: Path) -> None:
    _change_tensors(single, **{"model.norm.weight": torch.zeros(32, dtype=torch.int8)})
    _assert_refused(single, r"model\.norm\.weight is stored as torch\.int8; .*bf16, fp16 or fp32")


def test_a_dtype_that_is_unknown(single: Path) -> None:
    header = json.dumps({"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (single / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    _assert_refused(single, "w has dtype 'C64', which this library does not")
