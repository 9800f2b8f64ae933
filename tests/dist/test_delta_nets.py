"""Gated delta nets on a CPU: calibrated, rounded, evaluated and saved at several layouts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import megatron_quant as mq
from megatron_quant.errors import LayoutError
from tests.dist import checkpoints, plain, saved
from tests.dist.pool import Ranks
from tests.dist.test_family_exports import SIZES
from tests.dist.test_gptq import same
from tests.dist.test_layouts import digests, tensors

NAMES = ["qwen3_next", "qwen3_5_moe"]
LAYOUT = {"tp": 2, "ep": 2, "etp": 2}
WIDE = ("A_log", "dt_bias", "linear_attn.norm.weight")
SAVED = {
    "blocks": {"export_quant_cfg": "fp8_block", "export_format": "fp8", "algorithm": "mse"},
    "groups": {"export_quant_cfg": "nvfp4_mse", "weight_only": True},
}


@pytest.fixture(scope="module", params=NAMES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    checkpoints.save(request.param, path, **SIZES[request.param])
    (path / "text.txt").write_text("State after state, the delta rule goes on. " * 3)
    return path


GPTQ = {"export_quant_cfg": "nvfp4", "algorithm": "gptq"}
AWQ = {"export_quant_cfg": "int4_awq", "algorithm": None}  # its own


def rounded(source: Path, out: Path, flags: dict) -> float:
    """Calibrate and round, by GPTQ unless said; or round by what was measured before."""
    outcome = saved.quantize(
        hf_model_id=str(source),
        export_dir=out,
        cold_experts="layer-max",
        calib_size=4,
        calib_seq_length=32,
        dtype="fp32",
        eval_text=source / "text.txt",
        **{**GPTQ, **flags},
    )
    return outcome.fake_quant.mean_kl


def test_one_calibration_gives_equal_bytes(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    kept = {"save_calibration": tmp_path / "one.safetensors", "keep_hessians": True}
    (one,) = ranks(1, rounded, source, tmp_path / "one", kept)
    kept["save_calibration"] = tmp_path / "two.safetensors"
    ranks(4, rounded, source, tmp_path / "two", {**LAYOUT, **kept})
    same(load_file(tmp_path / "two.safetensors"), load_file(tmp_path / "one.safetensors"))
    loaded = {"load_calibration": tmp_path / "one.safetensors"}
    for found in ranks(4, rounded, source, tmp_path / "three", {**LAYOUT, **loaded}):
        assert found == pytest.approx(one, rel=0.02) and found > 0
    assert digests(tmp_path / "three") == digests(tmp_path / "one")
    text, windows = source / "text.txt", {"seq_length": 32, "dtype": "fp32"}
    served = mq.evaluate(tmp_path / "one", text, against=source, **windows)
    assert served.kl == pytest.approx(one, rel=1e-4), "fake quant is what transformers computes"
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    gates = [n for n in config["quantization_config"]["ignore"] if "linear_attn" in n]
    leaves = {n.rpartition(".")[2] for n in gates}
    assert leaves in ({"in_proj_ba"}, {"in_proj_b", "in_proj_a"})


def test_a_megatron_checkpoint_at_another_layout(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    ranks(4, saved.quantize_all, source, tmp_path / "four", [2, 2, 2], SAVED)
    dialects = {"blocks": "fp8", "groups": "modelopt"}
    ranks(1, saved.load_all, tmp_path / "four", tmp_path / "one", [1, 1, 1], dialects)
    for name in SAVED:
        found, want = (tensors(tmp_path / f / name) for f in ("one", "four"))
        assert found.keys() == want.keys()
        for key, value in want.items():
            if key.endswith(WIDE):  # no source says their dtype, so they stay as wide as they were
                assert found[key].dtype is torch.float32
                value = value.float()
            assert same_bytes(found[key], value), key


def test_a_plain_training_checkpoint(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    """At another layout than it was saved at; as from the Hugging Face folder."""
    ranks(2, plain.save_run, source, tmp_path / "wide", plain.Training((2, 1, 2), stacked=True))
    ranks(1, plain.save_run, source, tmp_path / "narrow", plain.Training(narrow=True))
    ranks(2, quantize_each, source, tmp_path, {"hf": None, "wide": "wide", "narrow": "narrow"})
    want = tensors(tmp_path / "hf.out")
    for name in ("wide", "narrow"):
        found = tensors(tmp_path / f"{name}.out")
        assert found.keys() == want.keys()
        for key, value in want.items():
            if key.endswith(WIDE):
                value = value.float() if name == "wide" else value.bfloat16()
                if key.endswith("norm.weight") and name == "narrow":
                    value = value - 1 + 1  # the run has it less one
            assert same_bytes(found[key], value), (name, key)


def saved_as_fsdp(source: Path, folder: Path) -> bool:
    from tests.dist import fsdp

    fsdp.save(source, folder)
    return fsdp.SPLITS_DELTA_NETS


def test_a_run_of_megatron_fsdp(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Read where its release saves the parts apart; otherwise refused."""
    (split, _) = ranks(2, saved_as_fsdp, source, tmp_path / "run" / "iter_0000005")
    flags = {"megatron_load_path": tmp_path / "run", "export_dir": tmp_path / "run.out"}
    flags |= {"export_quant_cfg": "nvfp4", "weight_only": True}
    if not split:
        (error,) = ranks.errors(1, saved_at, source, flags)
        assert "in_proj.weight has the rows of query and key" in str(error)
        assert "save the run as torch_dist" in str(error)
        return
    ranks(1, saved_at, source, flags)
    ranks(1, saved_at, source, {**flags, "megatron_load_path": None, "export_dir": tmp_path / "hf"})
    found, want = tensors(tmp_path / "run.out"), tensors(tmp_path / "hf")
    assert found.keys() == want.keys()
    plain_ones = [key for key in want if not key.endswith(WIDE)]  # the run's own dtype
    assert all(same_bytes(found[key], want[key]) for key in plain_ones)


def test_factors_go_into_the_gates_too(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    """The norm that awq divides is that of all rows of in_proj, quantized or not."""
    (one,) = ranks(1, rounded, source, tmp_path / "one", AWQ)
    ranks(4, rounded, source, tmp_path / "four", {**LAYOUT, **AWQ})
    assert digests(tmp_path / "four") == digests(tmp_path / "one")
    text, windows = source / "text.txt", {"seq_length": 32, "dtype": "fp32"}
    served = mq.evaluate(tmp_path / "one", text, against=source, **windows)
    assert served.kl == pytest.approx(one, rel=1e-4)


def quantize_each(source: Path, folder: Path, runs: dict[str, str | None]) -> None:
    for name, run in runs.items():
        saved.quantize(
            hf_model_id=str(source),
            megatron_load_path=folder / run if run else None,
            export_dir=folder / f"{name}.out",
            export_quant_cfg="nvfp4",
            weight_only=True,
            ep=2,
        )


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def test_a_norm_is_shifted_and_the_gates_stay(source: Path, ranks: Ranks) -> None:
    for norm, wide, kept in ranks(2, facts, source):
        assert torch.equal(norm + 1, torch.linspace(0.1, 2, 32).bfloat16().float())
        assert wide == {"A_log", "dt_bias", "out_norm.weight"} and kept


def facts(source: Path) -> tuple[torch.Tensor, set[str], bool]:
    """The norm's weight, what is in float32, and whether rows of b and a are as they were."""
    from megatron_quant.ckpt.read.open import open_source
    from megatron_quant.ckpt.plan.ranks import Layout
    from megatron_quant.mcore.model.load import load_model
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.models import lookup

    checkpoint, groups = open_source(source), start_distributed()
    layout = Layout.simulate(2, 2, 1, 1, 4)
    architecture = lookup(checkpoint.config)
    loaded = load_model(checkpoint, architecture, layout, groups, torch.bfloat16, lambda n: None)
    module = loaded.module
    layer = module.decoder.layers[0].self_attention
    before = layer.in_proj.weight.detach().clone()
    mq.quantize(module, "w4a16_nvfp4", hf_model=source)
    quantized = layer.in_proj.weight_quantizer(layer.in_proj.weight).detach()
    rows = len(before) - 8  # two gates of four value heads
    changed = (quantized != before).any(1)
    own = {n for n, p in layer.named_parameters() if p.dtype is torch.float32}
    return layer.out_norm.weight.detach(), own, bool(changed[:rows].all() and not changed[rows:].any())


def test_blocks_that_parts_of_one_linear_share(tmp_path: Path, ranks: Ranks) -> None:
    """q has 96 rows: at --tp 2 its last block would be merged with none of k's."""
    sizes = {**SIZES["qwen3_5_moe"], "linear_num_key_heads": 2, "linear_key_head_dim": 48}
    source = checkpoints.save("qwen3_5_moe", tmp_path / "source", **sizes)
    flags = {"export_quant_cfg": "fp8_block", "export_format": "fp8", "export_dir": tmp_path / "o"}
    for error in ranks.errors(2, saved_at, source, {**flags, "tp": 2}):
        assert isinstance(error, LayoutError)
        assert "in the middle of blocks of 128 rows: leave --tp at 1" in str(error)
    ranks(1, saved_at, source, flags)


def saved_at(source: Path, flags: dict) -> None:
    saved.quantize(hf_model_id=str(source), **flags)


def test_ranks_cannot_share_a_sequence(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    flags = {"export_quant_cfg": "fp8", "export_dir": tmp_path / "out", "cp": 2}
    for error in ranks.errors(2, saved_at, source, flags):
        assert isinstance(error, LayoutError) and str(error).startswith("--cp 2: a gated delta net")
