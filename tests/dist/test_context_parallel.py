"""Context parallelism: ranks that share each sequence measure what one rank measures."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_quant.errors import LayoutError
from tests.dist import checkpoints, saved
from tests.dist.pool import Ranks
from tests.dist.test_gptq import same

SIZES = {
    "hidden_size": 64,
    "head_dim": 32,
    "num_experts": 4,
    "moe_intermediate_size": 64,
    "intermediate_size": 64,
    "mlp_only_layers": [1],
}
# (ranks, flags)
LAYOUTS = [
    (4, {"cp": 2, "tp": 2, "ep": 2}),
    (4, {"cp": 2, "pp": 2}),
    (4, {"cp": 2, "ep": 4}),  # two samples at a time, each shared by two
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"), **SIZES)
    (path / "text.txt").write_text("Ranks share a sequence, chunk by chunk. " * 3)
    return path


def measure(source: Path, out: Path, flags: dict) -> tuple[float, float]:
    """Calibrate and evaluate; keep what was measured in ``out``."""
    text = {"calib_size": 4, "calib_seq_length": 32, "calib_batch_size": 1}
    outcome = saved.quantize(
        hf_model_id=str(source),
        export_quant_cfg="nvfp4",
        algorithm="gptq",
        export_kv_cache_quant="fp8",
        cold_experts="layer-max",
        dtype="fp32",
        eval_text=source / "text.txt",
        save_calibration=out.with_suffix(".safetensors"),
        keep_hessians=True,
        export_dir=out,
        **text,
        **flags,
    )
    return outcome.fake_quant.perplexity, outcome.fake_quant.mean_kl


def test_statistics_and_losses_are_those_of_one_rank(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    (one,) = ranks(1, measure, source, tmp_path / "one", {})
    want = load_file(tmp_path / "one.safetensors")
    assert sum(int(t) for n, t in want.items() if n.endswith("input_tokens")) > 0
    for number, (world, flags) in enumerate(LAYOUTS):
        out = tmp_path / str(number)
        for found in ranks(world, measure, source, out, flags):
            assert found == pytest.approx(one, rel=0.05), flags
        same(load_file(out.with_suffix(".safetensors")), want)


@pytest.mark.parametrize(
    ("world", "flags", "said"),
    [
        (2, {"cp": 4}, "--cp 4: .* world size 2; start a multiple of 4 ranks"),
        (2, {"cp": 2, "calib_seq_length": 30}, "--cp 2 x 2 does not divide .* 30: .* of 4"),
        (2, {"cp": 2, "stream": True}, "--cp 2 does not go with --stream"),
    ],
)
def test_sizes_that_do_not_fit(
    world: int, flags: dict, said: str, source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    errors = ranks.errors(world, refused, source, tmp_path / "out", flags)
    for error in errors:
        assert isinstance(error, LayoutError)
        with pytest.raises(LayoutError, match=said):
            raise error


def refused(source: Path, out: Path, flags: dict) -> None:
    from megatron_quant.cli.console import ConsolePhases, console
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.runs.file_to_file import stream_files
    from megatron_quant.runs.options import QuantizeOptions

    flags = {"hf_model_id": str(source), "export_quant_cfg": "fp8", "export_dir": out, **flags}
    if not flags.get("stream"):
        saved.quantize(**flags)
    stream_files(QuantizeOptions.from_flags(**flags), start_distributed(), ConsolePhases(console()))


def gradients(source: Path) -> dict[str, torch.Tensor]:
    """Weight gradients of a step, summed over the ranks that share its sequences."""
    from megatron_quant.ckpt.plan.ranks import Layout
    from megatron_quant.ckpt.read.open import open_source
    from megatron_quant.mcore.model.load import load_model
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.mcore.model.schedule import run_backward
    from megatron_quant.models import lookup
    from megatron_quant.search import next_token_loss

    world, checkpoint, groups = dist.get_world_size(), open_source(source), start_distributed()
    layout = Layout.simulate(world, 1, 1, 1, SIZES["num_experts"]).sharing_sequences(world)
    architecture = lookup(checkpoint.config)
    model = load_model(checkpoint, architecture, layout, groups, torch.float32, lambda n: None)
    ids = torch.randint(0, 200, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    run_backward(model.module, list(ids), lambda logits, ids: next_token_loss(logits, ids))
    found = {}
    for name, parameter in model.module.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(found[name])
    return found


def test_a_backward_gives_the_gradients_of_one_rank(source: Path, ranks: Ranks) -> None:
    """Of sequences that are padded to be shared, too."""
    (want,) = ranks(1, gradients, source)
    for found in ranks(2, gradients, source):
        assert found.keys() == want.keys()
        for name, gradient in want.items():
            close = {"rtol": 1e-3, "atol": 1e-5 * gradient.abs().max().item()}
            torch.testing.assert_close(found[name], gradient, **close, msg=lambda m: f"{name}: {m}")
    assert sum(bool(gradient.any()) for gradient in want.values()) > 10
