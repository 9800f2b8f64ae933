"""The commands of docs/from_training.md, in their order, on a run that megatron-core saved."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.dist import checkpoints, plain
from tests.dist.command import command
from tests.dist.pool import Ranks
from tests.unit import pages

PAGE = pages.ROOT / "docs" / "from_training.md"
OTHERS = [["vllm", "serve", "OUT"]]
"""Commands of other programs; tests/vllm runs vLLM on exports."""
QUICK = ["--calib-size", "4", "--calib-seq-length", "32", "--cold-experts", "layer-max"]
SIZES = {"num_experts": 4, "moe_intermediate_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """``RUN``, ``PATH`` without weights, and the texts."""
    folder = tmp_path_factory.mktemp("page")
    source = checkpoints.save("qwen3_moe", folder / "source", **SIZES)
    how = plain.Training((2, 1, 1), padding=128, beside=True)
    ranks(2, plain.save_run, source, folder / "RUN", how)
    shutil.copytree(source, folder / "PATH", ignore=shutil.ignore_patterns("*.safetensors"))
    said = {"model": {"hf_model_id": str(folder / "PATH")}}
    (folder / "RUN" / "iter_0000003" / "run_config.yaml").write_text(yaml.safe_dump(said))
    texts = [json.dumps({"text": "The quick brown fox jumps. " * 20})] * 8
    (folder / "corpus.jsonl").write_text("\n".join(texts))
    (folder / "heldout.txt").write_text("It jumps over the lazy dog. " * 40)
    return folder


def placed(words: list[str], folder: Path, out: Path) -> list[str]:
    """The words with the test's own paths for those that stand for a place."""
    names = {name: folder / name for name in ("RUN", "PATH", "corpus.jsonl", "heldout.txt")}
    return [str({**names, "OUT": out}.get(word, word)) for word in words]


def test_every_command(folder: Path, tmp_path: Path, ranks: Ranks) -> None:
    others, out, runs = [], tmp_path / "none", 0
    for words in pages.commands(PAGE):
        if "quantize" in words[1] or words[0] == "torchrun":
            runs, out = runs + 1, tmp_path / str(runs)
        if words[0] == "torchrun":
            assert words[1:4] == ["--nproc-per-node", "4", "examples/quantize.py"]
            argv = ["quantize", *placed(words[4:], folder, out), *QUICK]
            ended = ranks(4, command, *argv)
        elif words[0] == "megatron-quant":
            ended = ranks(1, command, *placed(words[1:], folder, out))
        else:
            others.append(words)
            continue
        assert [e.status for e in ended] == [0] * len(ended), (words, ended)
    assert (runs, others) == (4, OTHERS)
    first = json.loads((tmp_path / "0" / "config.json").read_text())
    assert first["quantization_config"]["quant_algo"] == "NVFP4"
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("1", "2", "3")]
    assert weights[0] == weights[1] == weights[2]
