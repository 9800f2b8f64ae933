import math

import pytest
import torch
import torch.nn.functional as F

from megatron_quant.evaluation.metrics import (
    NOTHING,
    Losses,
    Sums,
    nll_and_kl,
    token_losses,
    windows,
)
from megatron_quant.evaluation.parts import CLASSES, Breakdown, TokenClasses


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


def test_losses_of_tokens_add_up_to_the_sums():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    reference = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(6)
    losses = token_losses(logits, reference, labels)
    alone = [
        nll_and_kl(logits[i : i + 1], reference[i : i + 1], labels[i : i + 1]) for i in range(6)
    ]
    assert losses.nll_T.tolist() == pytest.approx([one.nll for one in alone])
    assert losses.kl_T.tolist() == pytest.approx([one.kl for one in alone])
    assert losses.sums == nll_and_kl(logits, reference, labels)
    assert losses.nll_T.sum().item() == pytest.approx(F.cross_entropy(logits, labels).item() * 6)


class Letters:
    """A byte-level tokenizer of the pieces below."""

    all_special_ids = (0,)
    pieces = ("<s>", "Ġthe", "cat", "Ġ12", "ĠâĤ", "Ċ", "!", "ĠĠ", "s")
    texts = ("<s>", " the", "cat", " 12", " \ufffd", "\n", "!", "  ", "s")

    def convert_ids_to_tokens(self, token):
        return self.pieces[token]

    def decode(self, tokens):
        return "".join(self.texts[t] for t in tokens)


def test_tokens_have_classes():
    window = torch.tensor([0, 1, 2, 8, 3, 4, 5, 2, 6, 8, 7, 0])
    named = [CLASSES[i] for i in TokenClasses(Letters())(window)]
    assert named == [
        *("first of a word", "rest of a word", "rest of a word", "digits", "bytes of a character"),
        *("line ends", "first of a word", "punctuation", "first of a word", "spaces", "special"),
    ]


@pytest.mark.parametrize(("length", "labels"), [(2, ["1", "2"]), (64, ["1 to 2", "3 to 4"])])
def test_losses_are_added_up_by_position_and_class(length, labels):
    breakdown = Breakdown(length, lambda window: (window[1:] % 2).tolist())
    windows_of = [torch.arange(length + 1), torch.arange(length + 1)]
    for scale, window in enumerate(windows_of, 1):
        each = torch.arange(length, dtype=torch.float64) * scale
        breakdown.add(window, Losses(each, each * 10))
    parts = breakdown.parts
    assert (parts.seq_length, [p.label for p in parts.positions][:2]) == (length, labels)
    assert [p.label for p in parts.classes] == list(CLASSES[:2])
    for of in (parts.positions, parts.classes):
        total = sum((p.sums for p in of), NOTHING)
        assert total == Sums(3.0 * sum(range(length)), 30.0 * sum(range(length)), 2 * length)
    per = length // min(length, 32)
    assert parts.positions[1].sums.nll == 3.0 * sum(range(per, 2 * per))
    assert parts.classes[1].sums.nll == 3.0 * sum(range(0, length, 2))  # labels are one further
