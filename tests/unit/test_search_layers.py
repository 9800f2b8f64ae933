"""A search that runs one decoder layer at a time: what it scores, holds, keeps and refuses."""

import gc
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import megatron_quant as mq
from megatron_quant.cli.console import size as shown
from megatron_quant.dist import Groups
from megatron_quant.errors import CalibrationError, ExportError, QuantError
from megatron_quant.runs import stream_scores
from megatron_quant.runs.phases import Quiet
from megatron_quant.streaming import stages, states
from tests.dist import checkpoints
from tests.dist.command import command
from tests.unit.search_world import WHOLE, fit, places_of, scores, work_of
from tests.unit.test_stream_layers import Killed, save, shares_keys, tensor_bytes, wide

FORMATS = "w4a16_nvfp4,fp8"
CACHED = {"rules": [{"quantize": ["*"], "weights": "nvfp4"}], "kv_cache": "fp8_cast"}


def tokens(rows: tuple[int, ...] = (2, 1)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 250, (n, 16), generator=generator) for n in rows]


def tied(directory: Path) -> Path:
    return checkpoints.save("qwen3", directory, tie_word_embeddings=True)


def made(name: str, directory: Path) -> Path:
    own: dict[str, Callable[[Path], Path]] = {"shared keys": shares_keys, "tied": tied}
    return own[name](directory) if name in own else save(name, directory)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


FAMILIES = [
    *("qwen3_moe", "gemma4", "gemma4_text", "qwen3_next", "deepseek_v3", "gpt_oss", "llama4"),
    *("qwen2_moe", "mixtral", "shared keys", "tied"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_score_as_the_whole_model_does(name: str, tmp_path: Path) -> None:
    """Weights, and the KV cache where there is one; by gradient and by divergence."""
    source, batches = made(name, tmp_path / "source"), tokens()
    formats, given = FORMATS, {}
    if name in ("qwen3_moe", "gemma4_text", "shared keys"):
        (tmp_path / "cached.yaml").write_text(json.dumps(CACHED))
        formats = f"{tmp_path / 'cached.yaml'},fp8"
        given = {"cost": "active", "context_length": 100, "bits": 15.0}
    whole = None
    for method in ("gradient", "kl_div"):
        work = work_of(source, batches, formats, method, **given)
        whole = whole or fit(work, source)
        found, wanted = scores(work, source), WHOLE[method](whole, batches)
        assert found.keys() == wanted.keys()
        for place, own in found.items():
            assert own == pytest.approx(wanted[place], rel=1e-4, abs=1e-9), (method, place)
            assert own[-1] == 0 and all(score > 0 for score in own[:-1]), (method, place)
    assert whole is not None
    for held in (h for w in places_of(whole) for h in w.held):  # some are stored the other way
        shapes = {w.shape[1] for w in held.views(held.parameter)}
        assert {slot.shape[1] for slot in held.slots} == shapes


@pytest.fixture
def fresh() -> Iterator[None]:
    """Lists of all objects have only new ones, and are short."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_memory_does_not_grow_with_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    """Counted whenever a layer or the output layer has run, in both methods."""
    run_layer, run_head = stages.Call.run, stages.Calls.logits
    peaks: dict[tuple[str, int], int] = {}
    for layers in (4, 8, 16):
        source = wide(layers, tmp_path / str(layers))
        for method in ("gradient", "kl_div"):
            seen: list[int] = []

            def counted(run: Any, held: list = seen) -> Any:
                def call(*args: Any) -> torch.Tensor:
                    made = run(*args)
                    held.append(tensor_bytes())
                    return made

                return call

            monkeypatch.setattr(stages.Call, "run", counted(run_layer))
            monkeypatch.setattr(stages.Calls, "logits", counted(run_head))
            work = work_of(source, tokens((1,)), "fp8_channel", method)
            found = scores(work, source)
            assert len(seen) > 2 * layers and len(found) == 4 * layers
            peaks[method, layers] = max(seen)
    for method in ("gradient", "kl_div"):
        few, more, most = (peaks[method, layers] for layers in (4, 8, 16))
        assert few > 1_500_000
        assert more < 1.05 * few and most < 1.1 * few


def test_the_plan_says_what_it_takes(tmp_path: Path) -> None:
    """The output layer, or a layer with its largest place once more; disk for each method."""
    source = wide(4, tmp_path / "source")
    stored = load_file(source / "model.safetensors")
    layer = sum(t.nbytes for n, t in stored.items() if n.startswith("model.layers.1."))
    largest = 2 * stored["model.layers.1.mlp.up_proj.weight"].nbytes
    flags = ["--stream", "--hf-model-id", str(source), "--auto-quantize-bits", "6", "--dry-run"]
    flags += ["--auto-quantize-score-size", "10", "--calib-seq-length", "100"]
    flags += ["--auto-quantize-checkpoint", "scores"]
    changes = 4 * 4 * 2
    borders = {"gradient": 5 + 2, "kl_div": 5 + 16 + 1}
    for method, loads in (("gradient", 2), ("kl_div", 1 + changes // 16)):
        said = command("quantize", *flags, "--auto-quantize-method", method).out
        words = " ".join(said.split())
        disk = borders[method] * 1000 * 64 * 2
        assert (
            f"scores: layer by layer, {shown(layer + largest)} of weights at a time, each layer "
            f"loaded {loads} times; hidden states of 1000 tokens take {shown(disk)} of disk in "
            "scores"
        ) in words
        assert f"16 places, {changes} formats at them in all" in words
    assert not (tmp_path / "scores").exists()
    with pytest.raises(QuantError, match="--dry-run plans a search by --stream alone: add it"):
        mq.plan_search(source, mq.AutoQuantize(bits=6.0), stream=False)


class Runs:
    """Layers and output layers that ran; the one after ``left`` stops the search."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.left = 0, 1 << 30
        for of, name in ((stages.Call, "run"), (stages.Calls, "logits")):
            monkeypatch.setattr(of, name, self._counted(getattr(of, name)))

    def _counted(self, run: Any) -> Any:
        def call(*args: Any) -> torch.Tensor:
            if self.left == 0:
                raise Killed
            self.left, self.count = self.left - 1, self.count + 1
            return run(*args)

        return call

    def of(self, run: Callable[[], Any], left: int = 1 << 30) -> int:
        self.count, self.left = 0, left
        run()
        return self.count


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_a_search_goes_on_at_the_layer_it_was_in(
    method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(monkeypatch)

    def begun(name: str) -> Callable[[], Any]:
        work = work_of(source, tokens(), FORMATS, method, checkpoint=tmp_path / name)
        return lambda: found.append(scores(work, source))

    at_head = 2 * 12  # of all options and batches, which begin anew
    found: list[Any] = []
    whole = runs.of(begun("whole"))
    (wanted,) = found
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == [
        *("batch-0.safetensors", "batch-1.safetensors", "search.json")
    ]
    moments = random.Random(method).sample(range(3, whole), 5)
    for at in moments:
        with pytest.raises(Killed):
            runs.of(begun(str(at)), at)
        again = runs.of(begun(str(at)))
        assert found.pop() == wanted
        assert again < whole and again + at <= whole + at_head, at
        assert not (tmp_path / str(at) / "walk").exists()


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_spoiled_files_are_made_again(
    method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = scores(work_of(source, tokens(), FORMATS, method), source)
    runs = Runs(monkeypatch)
    work = work_of(source, tokens(), FORMATS, method, checkpoint=tmp_path / "scores")
    kinds = set()
    for spoil in ("layer-0", "layer-2", "gradients", "change", "scores"):
        with pytest.raises(Killed):
            runs.of(lambda: scores(work, source), 8 if method == "gradient" else 20)
        for path in (tmp_path / "scores" / "walk").glob(f"rank-0.{spoil}*"):
            content = bytearray(path.read_bytes())
            content[-3] ^= 1
            path.write_bytes(content[:-1] if spoil == "scores" else content)
            kinds.add(spoil)
        runs.left = 1 << 30
        assert scores(work, source) == wanted, spoil
        for path in (tmp_path / "scores").glob("batch-*"):
            path.unlink()
    of_method = {"gradient": "gradients", "kl_div": "change"}[method]
    assert kinds == {"layer-0", "layer-2", of_method, "scores"}


def shares(source: Path, folder: Path) -> Any:
    work = work_of(source, tokens((1, 2, 1)), FORMATS, "kl_div", checkpoint=folder)
    return stream_scores.stream_scores(work, source, Groups(), Quiet())


def test_other_ranks_go_on(
    source: Path, tmp_path: Path, ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks after one that was stopped, and more ranks than batches."""
    wanted = shares(source, tmp_path / "whole")
    with monkeypatch.context() as patched:
        runs = Runs(patched)
        with pytest.raises(Killed):
            runs.of(lambda: shares(source, tmp_path / "two"), 20)
    assert (tmp_path / "two" / "walk").is_dir()
    for world, name in ((2, "two"), (4, "four")):
        for found in ranks(world, shares, source, tmp_path / name):
            assert torch.equal(found, wanted)
        assert not (tmp_path / name / "walk").exists()


def test_a_model_that_is_no_chain_of_layers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeModel
    forward = kind.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", doubled)
    work = work_of(source, tokens(), FORMATS, "gradient", checkpoint=tmp_path / "scores")
    with pytest.raises(CalibrationError) as error:
        scores(work, source)
    assert str(error.value) == (
        f"{source}: transformers' model cannot run layer by layer (its forward does not run the "
        "layers one after another), and so is not scored; a search without --stream scores "
        "Megatron's model"
    )
    assert [p.name for p in (tmp_path / "scores").iterdir()] == ["search.json"]


def test_a_full_disk_is_said_and_the_search_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(source, tokens(), FORMATS, "gradient", checkpoint=tmp_path / "scores")
    allocate, left = states.allocate, [4]

    def full(fd: int, size: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        allocate(fd, size)

    monkeypatch.setattr(states, "allocate", full)
    with pytest.raises(ExportError, match=r"walk/rank-0\.gradients-2.* cannot take \d+ bytes: No"):
        scores(work, source)
    assert (tmp_path / "scores" / "walk" / "rank-0.layer-2.safetensors").is_file()
    unkept = replace(work, auto=replace(work.auto, checkpoint=None))
    found = scores(work, source)
    assert found == scores(unkept, source)
    (tmp_path / "scores" / "walk").mkdir()  # killed when all was scored
    assert scores(work, source) == found
    assert not (tmp_path / "scores" / "walk").exists()
