"""A model that runs one decoder layer at a time: what it measures, holds, keeps and refuses."""

import errno
import gc
import json
import logging
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_quant.ckpt.read import open_stored
from megatron_quant.ckpt.write import LOCK, Existing
from megatron_quant.cli.console import size as shown
from megatron_quant.dist import Groups
from megatron_quant.errors import CalibrationError, CheckpointError, ExportError
from megatron_quant.models import Role
from megatron_quant.runs import file_layers
from megatron_quant.runs.file_to_file import plan_stream
from megatron_quant.streaming import model as loading
from megatron_quant.streaming import stages, states, walk
from megatron_quant.streaming.inputs import static_inputs
from megatron_quant.streaming.memory import LayerMemory, layer_memory
from megatron_quant.streaming.model import load_model, run_model, watched
from megatron_quant.streaming.observe import WeightInputAmax
from megatron_quant.streaming.skeleton import Skeleton
from megatron_quant.streaming.workplace import DOCUMENT, Workplace
from tests.dist import checkpoints, packed
from tests.dist.command import command
from tests.dist.test_kill import count_calls
from tests.unit import hf_models, sources
from tests.unit.test_stream_inputs import options, run

FAMILIES = [*hf_models.MODELS, "qwen3_moe", "qwen3"]


def save(name: str, directory: Path) -> Path:
    made = hf_models if name in hf_models.MODELS else checkpoints
    return made.save(name, directory)


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory) -> Path:
    return save("gemma4", tmp_path_factory.mktemp("gemma4"))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    return save("qwen3", tmp_path_factory.mktemp("qwen3"))


def tokens(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 250, (rows, 24), generator=generator) for rows in (2, 2, 1)]


def params_of(source: Path) -> list:
    job = plan_stream(options(source, source.parent / "out", export_quant_cfg="fp8"), 1).job
    return static_inputs(job.quant, job.params)


def walked(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    return walked_params(source, folder, params_of(source))


def walked_params(source: Path, folder: Path, params: list) -> dict[str, torch.Tensor]:
    place = Workplace(folder, "it", Existing.RESUME, Groups())
    skeleton = Skeleton(open_stored(source), torch.bfloat16)
    found = walk.Walk(
        skeleton=skeleton, params=params, batches=tokens(), place=place, on_batch=lambda n: None
    )
    try:
        return found.run()[0].amax
    finally:
        place.leave()


def at_once(source: Path) -> dict:
    model = load_model(source, torch.bfloat16)
    with torch.no_grad(), WeightInputAmax(watched(model, params_of(source))) as seen:
        for batch in tokens():
            run_model(model, batch)
    return seen.found.amax


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_measured_is_what_the_whole_model_shows(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    found = walked(source, tmp_path / "work")
    assert len(found) > 10 and found == at_once(source)


def test_exports_are_equal_and_nobody_loads_the_model(
    gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(file_layers, "by_layers", lambda *args: None)
        run(gemma4, tmp_path / "whole", save_calibration=tmp_path / "whole.safetensors")
    monkeypatch.setattr(loading, "load_model", None)
    run(gemma4, tmp_path / "layers", save_calibration=tmp_path / "layers.safetensors")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "layers" / path.name).read_bytes() == path.read_bytes(), path.name
    kept = [tmp_path / f"{name}.safetensors" for name in ("whole", "layers")]
    assert kept[0].read_bytes() == kept[1].read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_packed_sources_are_decoded_as_they_are_read(tmp_path: Path) -> None:
    """Single experts, and those of stacks that transformers loads whole."""
    for source, dense in (packed.save(tmp_path), hf_models.save_gpt_oss(tmp_path / "oss")[::-1]):
        found = walked(source, tmp_path / f"{source.name}-work")
        assert len(found) > 10 and found == at_once(dense)


def wide(layers: int, directory: Path) -> Path:
    """Layers of 2 MB each, and little beside them."""
    config = transformers.Qwen3Config(
        **hf_models.BASE | {"num_hidden_layers": layers, "intermediate_size": 4992}
    )
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    checkpoints.tokenizer().save_pretrained(directory)
    return directory


def tensor_bytes() -> int:
    """Bytes of all real tensors of this process, mapped files included."""
    held = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values()
    )


def test_memory_does_not_grow_with_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: dict[int, int] = {}
    run_layer = stages.Call.run
    for layers in (4, 8, 16):
        source = wide(layers, tmp_path / str(layers))
        gc.collect()
        before, seen = tensor_bytes(), []

        def look(call: Any, layer: Any, hidden: Any, *rest: Any, held: list = seen) -> Any:
            if len(hidden) == 1:  # the last batch
                held.append(tensor_bytes())
            return run_layer(call, layer, hidden, *rest)

        monkeypatch.setattr(stages.Call, "run", look)
        walked(source, tmp_path / f"work-{layers}")
        assert len(seen) == layers
        peaks[layers] = max(seen) - before
    assert peaks[4] > 1_000_000
    assert peaks[8] < 1.05 * peaks[4] and peaks[16] < 1.1 * peaks[4]


def test_the_plan_says_what_it_takes(tmp_path: Path) -> None:
    """The layer of an expert model with its experts, or the embeddings where they are larger."""
    for layers in (4, 8):
        source = wide(layers, tmp_path / str(layers))
        out = tmp_path / "out"
        job = plan_stream(options(source, out, export_quant_cfg="fp8"), 1).job
        stored = load_file(source / "model.safetensors")
        layer = [t.nbytes for n, t in stored.items() if n.startswith("model.layers.1.")]
        memory = LayerMemory(weights=sum(layer), states_per_token=2 * 64 * 2, sums=0, all_sums=0)
        assert job.layer_memory == memory
        argv = ["quantize", "--stream", "--hf-model-id", str(source), "--export-quant-cfg", "fp8"]
        said = command(*argv, "--dry-run", "--calib-size", "10", "--calib-seq-length", "100").out
        words = " ".join(said.split())
        assert f"calibration: layer by layer, {shown(sum(layer))} of weights at a time;" in words
        assert "hidden states of 1000 tokens take 256 KB of disk" in words
    rounded = plan_stream(options(source, out, export_quant_cfg="int4", algorithm="gptq"), 1).job
    inputs = 4 * (64 * 64 + 64 * 64 + 64 * 64 + 4992 * 4992)  # of qkv, o, gate and up, down
    assert (rounded.layer_memory.sums, rounded.layer_memory.all_sums) == (inputs, 8 * inputs)
    weights_alone = options(source, out, weight_only=True)
    assert plan_stream(weights_alone, 1).job.layer_memory is None
    big = [replace(p, shape=(50_000, 64)) if p.role is Role.EMBEDDING else p for p in job.params]
    assert (
        layer_memory(big, job.quant, torch.bfloat16, job.hf_config).weights == (50_000 + 1) * 64 * 2
    )


class Killed(BaseException):
    """In place of a SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def undisturbed(gemma4: Path, tmp_path_factory) -> dict[str, torch.Tensor]:
    return walked(gemma4, tmp_path_factory.mktemp("undisturbed") / "work")


def stopped_after(calls: int, monkeypatch: pytest.MonkeyPatch, source: Path, work: Path) -> None:
    """Stop a walk when so many batches have gone through a layer."""
    run_layer, left = stages.Call.run, calls

    def counted(*args: Any) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return run_layer(*args)

    with monkeypatch.context() as patched:
        patched.setattr(stages.Call, "run", counted)
        with pytest.raises(Killed):
            walked(source, work)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """Layers, as they run."""
    run_layer, ran = stages.Call.run, []

    def counted(call: Any, layer: Any, *rest: Any) -> torch.Tensor:
        ran.append(layer)
        return run_layer(call, layer, *rest)

    monkeypatch.setattr(stages.Call, "run", counted)
    return ran


def test_a_walk_goes_on_at_the_layer_it_was_in(
    gemma4: Path, undisturbed: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(4, monkeypatch, gemma4, tmp_path / "work")  # in the second of two layers
    ran = counting(monkeypatch)
    assert walked(gemma4, tmp_path / "work") == undisturbed
    assert len(ran) == 3
    assert walked(gemma4, tmp_path / "work") == undisturbed  # killed after it, in the export
    assert len(ran) == 3


@pytest.mark.parametrize("spoil", ["cut", "flip", "gone", "no progress"])
def test_spoiled_hidden_states_are_made_again(
    spoil: str, gemma4: Path, undisturbed: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    stopped_after(4, monkeypatch, gemma4, work)
    path = work / "rank-0.layer-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    {
        "cut": lambda: os.truncate(path, 2000),
        "flip": lambda: path.write_bytes(content),
        "gone": path.unlink,
        "no progress": lambda: (work / "rank-0.json").write_text("{"),
    }[spoil]()
    ran = counting(monkeypatch)
    assert walked(gemma4, work) == undisturbed
    assert len(ran) == 6


def begun(source: Path, out: Path) -> None:
    run(source, out, verify=False, calib_batch_size=1)


def resumed(source: Path, out: Path) -> None:
    run(source, out, verify=False, calib_batch_size=1, resume=True)


def killed_at(number: int, source: Path, out: Path) -> None:
    from tests.dist.test_kill import die_at

    die_at(number)
    begun(source, out)


def calls_of_a_run(source: Path, out: Path) -> int:
    calls: list[str] = []
    count_calls(lambda name, args: calls.append(name))
    begun(source, out)
    return len(calls)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_sigkill_at_random_moments(gemma4: Path, tmp_path: Path, ranks) -> None:
    """In the walk, between it and the export, and in the export."""
    (calls,) = ranks(1, calls_of_a_run, gemma4, tmp_path / "whole" / "out")
    wanted = contents(tmp_path / "whole")
    moments, refused = random.Random(0).sample(range(calls), 7), 0
    for number in sorted({*moments, 0, 5, 12}):
        at = tmp_path / str(number)
        at.mkdir()
        died = ranks.errors(1, killed_at, number, gemma4, at / "out", timeout=60)
        assert str(died[0]) == "the process died"
        again = ranks.errors(1, begun, gemma4, at / "out")[0]
        refused += "--resume" in str(again)
        ranks(1, resumed, gemma4, at / "out")
        assert contents(at) == wanted, number
    assert refused > 6


def test_a_killed_rank_leaves_what_all_need(gemma4: Path, tmp_path: Path, ranks) -> None:
    ranks(2, begun, gemma4, tmp_path / "whole" / "out")
    died = ranks.errors(2, killed_rank, gemma4, tmp_path / "out" / "out", timeout=60)
    assert str(died[1]) == "the process died" and died[0] is not None
    work = tmp_path / "out" / "out.calibration"
    assert DOCUMENT in {p.name for p in work.iterdir()}
    alone = ranks.errors(1, resumed, gemma4, tmp_path / "out" / "out")[0]
    assert "holds the calibration of another run (other ranks" in str(alone)
    ranks(2, resumed, gemma4, tmp_path / "out" / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def killed_rank(source: Path, out: Path) -> None:
    import signal

    import torch.distributed as dist

    run_layer = walk.Walk._layer

    def dies(self: walk.Walk, layer: int, *args: Any) -> Any:
        if layer == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return run_layer(self, layer, *args)

    walk.Walk._layer = dies
    begun(source, out)


def test_what_lies_in_the_folder_is_never_lost(gemma4: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.calibration"
    work.mkdir()
    (work / "mine.txt").write_text("mine")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ExportError, match=r"holds mine.txt, which no calibration has written"):
            run(gemma4, out, **flags)
    (work / "mine.txt").rename(work / "rank-0.json")
    with pytest.raises(ExportError, match=r"holds rank-0.json, which no calibration has written"):
        run(gemma4, out, overwrite=True)
    assert [p.name for p in work.iterdir()] == ["rank-0.json"] and not out.exists()


def test_a_calibration_of_something_else_is_not_continued(
    gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(**changes: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(walk.Walk, "_layer", lambda *args: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                run(gemma4, tmp_path / "out", **changes)

    stopped()
    left = contents(tmp_path)
    with pytest.raises(ExportError, match="unfinished calibration; continue it with --resume"):
        run(gemma4, tmp_path / "out")
    for other in ({"calib_size": 3}, {"dtype": "fp32"}, {"export_quant_cfg": "nvfp4_mlp_only"}):
        with pytest.raises(ExportError, match="holds the calibration of another run"):
            run(gemma4, tmp_path / "out", resume=True, **other)
    assert contents(tmp_path) == left and not any(LOCK in name for name in left)
    run(gemma4, tmp_path / "out", overwrite=True, calib_size=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_failed_run_leaves_nothing(gemma4: Path, tmp_path: Path) -> None:
    source = shutil.copytree(gemma4, tmp_path / "source")
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    sources.edit(source, lambda t: t | {name: torch.full_like(t[name], torch.inf)})
    with pytest.raises(
        CalibrationError, match=r"input of .*layers\.1\.self_attn\.o_proj.* NaN or Inf"
    ):
        run(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_said_before_the_walk(
    gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(states, "allocate", full)
    with pytest.raises(ExportError, match=r"cannot take \d+ bytes: No space left on device; free"):
        run(gemma4, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_tensor_that_a_layer_lacks_is_named(qwen3: Path, tmp_path: Path) -> None:
    source = shutil.copytree(qwen3, tmp_path / "source")
    name = "model.layers.1.self_attn.q_norm.weight"
    sources.edit(source, lambda t: {n: v for n, v in t.items() if n != name})
    with pytest.raises(CheckpointError, match=r"nothing for layers\.1\.self_attn\.q_norm\.weight"):
        walked_params(source, tmp_path / "work", params_of(qwen3))


def shares_keys(directory: Path) -> Path:
    """A Gemma-4 whose last layer takes keys and values of the one before it."""
    config = transformers.Gemma4TextConfig(
        **hf_models.GEMMA4
        | {
            "num_kv_shared_layers": 1,
            "layer_types": ["full_attention", "full_attention"],
            "hidden_size_per_layer_input": 16,
        }
    )
    torch.manual_seed(0)
    transformers.Gemma4ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    checkpoints.tokenizer().save_pretrained(directory)
    return directory


def test_layers_that_hand_on_keys_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in no file: a stopped walk begins anew."""
    source = shares_keys(tmp_path / "source")
    stopped_after(4, monkeypatch, source, tmp_path / "work")
    ran = counting(monkeypatch)
    assert walked(source, tmp_path / "work") == at_once(source)
    assert len(ran) == 6


def test_a_model_that_is_no_chain_of_layers_is_loaded_whole(
    qwen3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = transformers.models.qwen3.modeling_qwen3.Qwen3Model
    forward = layers.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(layers, "forward", doubled)
    with caplog.at_level(logging.WARNING):
        run(qwen3, tmp_path / "out", export_quant_cfg="fp8")
    (line,) = [r.getMessage() for r in caplog.records if r.name.endswith("file_layers")]
    assert line == (
        f"{qwen3}: transformers' model cannot run layer by layer (its forward does not run the "
        "layers one after another): every rank loads all of it"
    )
    monkeypatch.setattr(file_layers, "by_layers", lambda *args: None)
    run(qwen3, tmp_path / "whole", export_quant_cfg="fp8")
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")
    assert not (tmp_path / "out.calibration").exists()


@pytest.mark.parametrize("what", ["between", "twice", "fails"])
def test_forwards_that_are_no_chain_of_layers(
    what: str, qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> None:
        hidden = self.embed_tokens(input_ids)
        if what == "fails":
            raise ValueError("no\n such thing")
        for layer in self.layers:
            hidden = layer(hidden)
            hidden = layer(hidden) if what == "twice" else hidden + 1

    skeleton = Skeleton(open_stored(qwen3), torch.bfloat16)
    skeleton.fill_rest()
    monkeypatch.setattr(type(skeleton.model), "forward", forward)
    said = {
        "between": "changes the hidden states between layers",
        "twice": "does not run the layers one after another",
        "fails": "^no such thing$",
    }
    with pytest.raises(stages.CannotWalk, match=said[what]):
        stages.Calls(skeleton).of(tokens()[0])
    assert list(skeleton.model.layers) == skeleton.layers


def test_layers_that_return_tuples(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> None:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden_states=hidden)[0]

    skeleton = Skeleton(open_stored(qwen3), torch.bfloat16)
    skeleton.fill_rest()
    monkeypatch.setattr(type(skeleton.model), "forward", forward)
    hidden, calls = stages.Calls(skeleton).of(tokens()[0])
    assert hidden.shape == (2, 24, 128) and len(calls) == len(skeleton.layers)
    assert calls[0].run(lambda h: (h + 1, None), hidden).equal(hidden + 1)


def test_progress_is_whole_or_not_there(tmp_path: Path) -> None:
    place = Workplace(tmp_path / "work", "it", Existing.REFUSE, Groups())
    assert place.come() is None
    (tmp_path / "work" / "rank-0.json").write_text(json.dumps({"made_of": "it", "layer": 1}))
    assert place.come() is None
    place.remove()
    assert not any(tmp_path.iterdir())
