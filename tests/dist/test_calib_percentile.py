"""Inputs clipped at a percentile: of everything that all ranks saw, at every layout."""

from pathlib import Path

import pytest
import torch

from tests.dist import checkpoints
from tests.dist.pool import Ranks

LAYOUTS = {"1": (1, 1, 1, 1), "tp2": (2, 2, 1, 1), "tp2-ep2-etp2": (4, 2, 2, 2)}


def _merged_as_one(seed: int) -> None:
    """Histograms that grew on their own merge to that of one that saw everything."""
    from torch import nn

    from megatron_quant.calib.histogram import BINS, InputHistogram
    from megatron_quant.formats import amax
    from megatron_quant.formats.search import histogram

    generator = torch.Generator().manual_seed(seed)
    scales = (0.0, 1e-3, 0.4, 1.0, 2.0, 300.0, 0.5)
    pieces = [torch.randn(40, 16, generator=generator) * scale for scale in scales]
    pieces += [torch.tensor([[2.0, 4.0, 0.25]]), torch.zeros(0, 16)]
    one, several = InputHistogram(torch.device("cpu")), []
    for piece in pieces:
        one(nn.Identity(), (piece,))
        several.append(InputHistogram(torch.device("cpu")))
        several[-1](nn.Identity(), (piece,))
    exponent = max(h.exponent for h in several)
    for own in several:
        own.reach(exponent)
    everything = torch.cat([piece.flatten() for piece in pieces])
    limit = torch.tensor(2.0**exponent)
    assert limit / 2 <= amax(everything) < limit
    expected = histogram(everything, BINS, limit)
    assert one.exponent == exponent and torch.equal(one.counts, expected)
    assert torch.equal(sum(h.counts for h in several), expected)


def test_histograms_merge_exactly(ranks: Ranks) -> None:
    for seed in range(3):
        ranks(1, _merged_as_one, seed)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


def _input_amaxes(path: Path, tp: int, ep: int, etp: int) -> list[dict[str, float]]:
    """Slot -> what its inputs' scale covers, for each percentile."""
    from megatron_quant.calib.calibration import ColdExperts, InputRules, calibrate
    from tests.dist import live

    model = live.load(path, live.Parallelism(tp, ep, etp))
    attached = live.with_quantizers(model, "fp8")
    found = []
    for percentile in (100.0, 99.9, 90.0):
        forwards = attached.forwards(live.batches(4))
        report = calibrate(
            attached.layers,
            attached.plan,
            model.groups,
            forwards,
            InputRules(cold_experts=ColdExperts.LAYER_MAX, act_percentile=percentile),
        )
        assert report.input_amax
        found.append(
            {d.slot.name: x.input_amax().item() for x in attached.layers for d in x.decisions}
        )
    return found


def test_layouts_clip_alike(ranks: Ranks, moe: Path) -> None:
    found = {name: ranks(n, _input_amaxes, moe, *sizes) for name, (n, *sizes) in LAYOUTS.items()}
    ((largest, most, fewer),) = found["1"]
    for slot, value in largest.items():
        assert 0 < fewer[slot] < most[slot] < value, slot
    for name in ("tp2", "tp2-ep2-etp2"):
        for each in found[name]:
            for expected, own in zip((largest, most, fewer), each, strict=True):
                for slot, value in own.items():
                    assert value == pytest.approx(expected[slot], rel=0.02), (name, slot)
