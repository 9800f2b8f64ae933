"""Megatron-Bridge itself: AutoBridge, its provider, our hook, its distributed model, an export."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megatron_quant as mq
from megatron_quant.recipes.parse import parse_recipe
from tests.dist import checkpoints, drafts
from tests.dist.pool import Ranks
from tests.dist.test_live_models import weights

pytestmark = pytest.mark.skipif(not find_spec("megatron.bridge"), reason="make test-clients")
# Bridge takes no config whose routing weights are not normalized: it builds the other kind.
SIZES = {"num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 128}
LAYOUTS = [(1, 1, 1, 1), (2, 2, 2, 1), (2, 1, 1, 2)]  # ranks, tp, ep, pp
INPUTS = "input_scale"
GLM = {"num_hidden_layers": 2, "n_routed_experts": 4, "attention_bias": True, "use_qk_norm": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    return checkpoints.save("qwen3_moe", path, **SIZES, norm_topk_prob=True)


@pytest.fixture(scope="module")
def from_files(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """The same weights from the Hugging Face folder, without any model."""
    out = tmp_path_factory.mktemp("stream") / "out"
    ranks(1, stream, source, out)
    return out


def stream(source: Path, out: Path) -> None:
    mq.stream(source, "w4a16_nvfp4", out)


def model_of(
    source: Path, tp: int, ep: int, pp: int, hook: Any = None, **wrapped: Any
) -> list[Any]:
    from tests.clients import bridge

    provider = bridge.provider(source, tp, ep, pp)
    provider.initialize_model_parallel(seed=0)
    if hook is not None:
        provider.register_pre_wrap_hook(hook)
    return provider.provide_distributed_model(**(wrapped or {"wrap_with_ddp": False}))


def export_weights(source: Path, out: Path, tp: int, ep: int, pp: int) -> None:
    mq.quantize(model := model_of(source, tp, ep, pp), "w4a16_nvfp4", hf_model=source)
    mq.export(model, out)


@pytest.mark.parametrize(("world", "tp", "ep", "pp"), LAYOUTS)
def test_its_weights_are_those_of_the_files(
    ranks: Ranks,
    source: Path,
    from_files: Path,
    tmp_path: Path,
    world: int,
    tp: int,
    ep: int,
    pp: int,
) -> None:
    ranks(world, export_weights, source, tmp_path / "out", tp, ep, pp)
    assert weights(tmp_path / "out") == weights(from_files)


def run_batches(model: list[Any]) -> None:
    from megatron_quant.mcore.model import run_through

    batches = [torch.arange(64).view(2, 32) * step % 256 for step in (1, 3, 5)]
    run_through(mq.quantized(model).model.chunks, batches)


def export_hooked(source: Path, out: Path, tp: int, ep: int, pp: int) -> None:
    """Through the hook, Float16Module and DistributedDataParallel."""
    from functools import partial

    from megatron.bridge.training.config import DistributedDataParallelConfig

    from megatron_quant.mcore.training import QuantCallback, Schedule, prepare

    hook = partial(prepare, recipe="nvfp4", hf_model=str(source))
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    ddp.finalize()
    model = model_of(source, tp, ep, pp, hook, ddp_config=ddp)
    callback = QuantCallback(Schedule(calibrate_before=0), log=lambda line: None)
    callback.start(model)
    callback.calibrate([lambda: run_batches(model)])
    mq.export(model, out)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}


def export_direct(source: Path, out: Path) -> None:
    model = model_of(source, 1, 1, 1)
    mq.quantize(model, "nvfp4", run_batches, hf_model=source)
    mq.export(model, out)


def test_hooked_and_calibrated(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    """At one rank as by `mq.quantize`; at others but for what sums of a forward round otherwise."""
    found = []
    for world, tp, ep, pp in LAYOUTS:
        out = tmp_path / f"out{tp}{pp}"
        ranks(world, export_hooked, source, out, tp, ep, pp)
        found.append(tensors(out))
    ranks(1, export_direct, source, tmp_path / "direct")
    assert weights(tmp_path / "out11") == weights(tmp_path / "direct")
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert any(INPUTS in name for name in other)
        for name, tensor in other.items():
            close = 1e-2 if INPUTS in name else 0.0
            torch.testing.assert_close(tensor.float(), found[0][name].float(), rtol=close, atol=0)


def export_drafts(source: Path, out: Path, recipe: Any) -> None:
    from tests.clients import bridge

    plain = {"moe_shared_expert_overlap": False, "moe_permute_fusion": False}
    provider = bridge.provider(source, 2, 2, 2, **plain)
    provider.initialize_model_parallel(seed=0)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    assert provider.mtp_num_layers == 1
    mq.quantize(model, recipe, hf_model=source)
    mq.export(model, out)


def stream_drafts(source: Path, out: Path, recipe: Any) -> None:
    mq.stream(source, recipe, out)


@pytest.mark.parametrize("allowed", [False, True])
def test_its_layers_for_speculation(allowed: bool, tmp_path: Path, ranks: Ranks) -> None:
    """Bridge builds GLM-4.5 with ``mtp``; the export has it from there, quantized or not."""
    made = checkpoints.save("glm4_moe", tmp_path / "source", **GLM)
    source = drafts.add(made)
    rule = {"quantize": ["*mlp*"], "weights": "nvfp4", "allow_mtp": allowed}
    recipe = parse_recipe("mine", {"rules": [rule, {"exclude": ["*"]}]})
    ranks(4, export_drafts, source, tmp_path / "out", recipe)
    ranks(1, stream_drafts, source, tmp_path / "stream", recipe)
    found, want = tensors(tmp_path / "out"), tensors(tmp_path / "stream")
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        close = 1e-2 if "correction_bias" in name else 0.0  # Bridge loads it through bf16
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=close, atol=0)
    assert ("model.layers.2.mlp.experts.3.down_proj.weight_scale" in found) is allowed
