"""Signed INT4 scales: equal bytes at every layout, by every algorithm, and by ``--stream``."""

from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from megatron_quant.ckpt.verify.checkpoint import verify
from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_gptq import ONE, PATIENCE_S, run, stream
from tests.dist.test_layouts import digests

ALGORITHMS = ("gptq", "imatrix", "awq", "max", "mse")  # the last two take no data


def test_equal_bytes(tmp_path: Path, ranks: Ranks) -> None:
    """At two, edges between shards are inside groups of 128 columns, which need both signs."""
    source = checkpoints.save("qwen3_moe", tmp_path / "moe")
    recipe, file = tmp_path / "signed.yaml", tmp_path / "kept.safetensors"
    weights = {"format": "int4", "group_size": 128, "scales": "signed"}
    recipe.write_text(yaml.safe_dump({"rules": [{"quantize": ["*proj"], "weights": weights}]}))
    load = {"load_calibration": file}

    def cases(out: str, first: dict) -> list[dict]:
        return [
            {
                "export_quant_cfg": str(recipe),
                "algorithm": algorithm,
                "export_format": "auto-round",
                "export_dir": tmp_path / out / algorithm,
                **(first if algorithm == "gptq" else load if algorithm in ALGORITHMS[:3] else {}),
            }
            for algorithm in ALGORITHMS
        ]

    save = {"save_calibration": file, "keep_hessians": True}
    ranks(1, run, source, ONE, cases("one", save), timeout=PATIENCE_S)
    ranks(4, run, source, {"tp": 2, "etp": 2, "ep": 2}, cases("four", load), timeout=PATIENCE_S)
    ranks(1, stream, source, cases("stream", load), timeout=PATIENCE_S)
    for algorithm in ALGORITHMS:
        one = digests(tmp_path / "one" / algorithm)
        for other in ("four", "stream"):
            assert digests(tmp_path / other / algorithm) == one, (other, algorithm)
        assert verify(tmp_path / "one" / algorithm, None).problems == ()
        tensors = load_file(tmp_path / "one" / algorithm / "model.safetensors")
        scales = torch.cat([t.flatten() for n, t in tensors.items() if n.endswith("scales")])
        assert 0.3 < (scales < 0).float().mean() < 0.7, algorithm
