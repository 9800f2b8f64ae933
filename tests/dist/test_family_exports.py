"""Families through Megatron-Core: at TP x EP x ETP and in a pipeline, the bytes of ``--stream``."""

from pathlib import Path

import pytest

from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_layouts import digests, folder
from tests.dist.test_mixtures import export_all
from tests.dist.test_stream import stream_all

# Inner sizes that end inside 128 x 128 blocks where tp and etp cut them.
_FFN = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 192,
    "moe_intermediate_size": 192,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
}
SIZES = {
    "glm4_moe": {**_FFN, "attention_bias": True, "use_qk_norm": True},
    "glm4_moe_lite": _FFN,
    "dots1": {**_FFN, "first_k_dense_replace": 1},
    "hy_v3": {**_FFN, "num_experts": 4},
}
CASES = [
    {"export_quant_cfg": "nvfp4_mse", "expert_scales": "per_expert", "weight_only": True},
    {"export_quant_cfg": "fp8_block", "export_format": "fp8"},
]
LAYOUTS = [{"tp": 2, "ep": 2, "etp": 2}, {"tp": 2, "ep": 2, "pp": 2}]


@pytest.mark.parametrize("name", SIZES)
def test_every_layout_writes_what_a_stream_writes(name: str, tmp_path: Path, ranks: Ranks) -> None:
    source = checkpoints.save(name, tmp_path / "source", **SIZES[name])
    ranks(1, stream_all, source, tmp_path / "stream", CASES)
    for number, flags in enumerate(LAYOUTS):
        out = tmp_path / str(number)
        ranks(4, export_all, source, out, flags, CASES)
        for case in CASES:
            expected = digests(tmp_path / "stream" / folder(case))
            assert len(expected) > 4 and digests(out / folder(case)) == expected, (flags, case)
