import math

import pytest
import torch

from megatron_quant.evaluation.metrics import NOTHING, Sums, nll_and_kl, windows


def test_windows_predict_every_id_but_the_first_once():
    cut = list(windows(range(10), 3))
    assert [w.tolist() for w in cut] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert [i for w in cut for i in w[1:].tolist()] == list(range(1, 10))


@pytest.mark.parametrize(("ids", "count"), [(3, 0), (4, 1), (6, 1), (7, 2)])
def test_a_tail_that_fills_no_window_is_dropped(ids, count):
    assert len(list(windows(range(ids), 3))) == count


def test_nll_of_a_uniform_model_is_log_vocabulary():
    sums = nll_and_kl(torch.zeros(5, 8), None, torch.arange(5))
    assert sums.tokens == 5
    assert sums.perplexity == pytest.approx(8)
    assert sums.kl == 0


def test_kl_is_of_the_reference_to_the_model():
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])
    sums = nll_and_kl(q.log()[None], p.log()[None], torch.tensor([0]))
    assert sums.mean_kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_kl_of_a_model_to_itself_is_zero_in_bf16():
    logits = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert nll_and_kl(logits, logits, torch.zeros(16, dtype=torch.int64)).kl == 0


def test_sums_add_up_over_windows():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    reference = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(6)
    halves = [nll_and_kl(logits[h], reference[h], labels[h]) for h in (slice(3), slice(3, 6))]
    total, whole = sum(halves, NOTHING), nll_and_kl(logits, reference, labels)
    assert isinstance(total, Sums)
    assert (total.nll, total.kl) == pytest.approx((whole.nll, whole.kl))
    assert total.tokens == whole.tokens
