"""Megatron's distributed checkpoints: one layout saves, every other has the same model of it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.dist import checkpoints
from tests.dist.command import Ended, command, message, quantize_argv
from tests.dist.pool import Ranks
from tests.dist.test_layouts import PATIENCE_S, digests

# One layer whose inner sizes end inside groups of 128 and inside 128 x 128 blocks at etp 2 and 4.
SIZES = {"moe_intermediate_size": 704, "num_hidden_layers": 1, "num_experts": 4}
SAVED_AT = (4, 2, 2, 1)
# (ranks, tp, ep, etp)
LAYOUTS = [(4, 1, 4, 1), (4, 4, 1, 4), (1, 1, 1, 1)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


CASES = [
    {"export_quant_cfg": "fp8", "calib_size": 4, "cold_experts": "layer-max"},
    {"export_quant_cfg": "nvfp4_mse", "weight_only": True, "expert_scales": "per_expert"},
    {
        "export_quant_cfg": "fp8_block",
        "algorithm": "mse",
        "export_format": "fp8",
    },
]

def test_first(source, tmp_path, ranks):
    for i, case in enumerate(CASES):
        save = tmp_path / f"s{i}"
        argv = quantize_argv(source, tmp_path / f"d{i}", **{"weight_only": None, "calib_seq_length": 32, **case}, megatron_save_path=save)
        for e in ranks(4, command, *argv): 
            assert e.status == 0, e.err
        for at, (world, tp, ep, etp) in enumerate(LAYOUTS):
            out = tmp_path / f"o{i}-{at}"
            argv = ["export", "--megatron-load-path", str(save), "--export-dir", str(out), "--export-format", case.get("export_format", "modelopt"), "--tp", str(tp), "--ep", str(ep), "--etp", str(etp)]
            for e in ranks(world, command, *argv):
                assert e.status == 0, e.err
            assert digests(out) == digests(tmp_path / f"d{i}"), (case, at)
