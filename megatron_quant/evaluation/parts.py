"""Figures of parts of a text: by position in the window, and by class of token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedTokenizerBase

from megatron_quant.evaluation.metrics import NOTHING, Losses, Sums

CLASSES = (
    *("first of a word", "rest of a word", "digits", "punctuation", "line ends", "spaces"),
    *("bytes of a character", "special"),
)
"""Classes of tokens. A word has letters; its first token follows none of another word, or a space.
Tokens of a byte-level vocabulary that are no whole character are bytes of one."""
_FIRST, _REST, _DIGITS, _PUNCTUATION, _LINES, _SPACES, _BYTES, _SPECIAL = range(len(CLASSES))
_SPACED = ("\u0120", "\u2581")  # how byte-level and SentencePiece vocabularies write a space
_UNDECODED = "\ufffd"
_BINS = 32


@dataclass(frozen=True)
class Part:
    """A part of a text's tokens: its name, and the sums over its predicted tokens."""

    label: str
    sums: Sums


@dataclass(frozen=True)
class Parts:
    """Figures by position in the window, in order, and by class of the predicted token.

    seq_length: predicted tokens of a window.
    """

    seq_length: int = 0
    positions: tuple[Part, ...] = ()
    classes: tuple[Part, ...] = ()


class TokenClasses:
    """Finds the class of tokens, each once.

    Args:
        tokenizer: Their tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._known: dict[int, int] = {}

    def __call__(self, window: torch.Tensor) -> list[int]:
        """Return the index in :data:`CLASSES` of every id of a window but the first."""
        kinds = [self._kind(token) for token in window.tolist()]
        words = (_FIRST, _REST)
        return [
            _FIRST if kind == _REST and before not in words else kind
            for before, kind in pairwise(kinds)
        ]

    def _kind(self, token: int) -> int:
        if token not in self._known:
            self._known[token] = self._found(token)
        return self._known[token]

    def _found(self, token: int) -> int:
        if token in self._special:
            return _SPECIAL
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        decoded = str(self._tokenizer.decode([token]))
        text = decoded.strip()
        if _UNDECODED in text:
            return _BYTES
        if not text:
            return _LINES if "\n" in decoded or "\r" in decoded else _SPACES
        if any(c.isalpha() for c in text):
            return _FIRST if piece.startswith(_SPACED) or decoded[0].isspace() else _REST
        return _DIGITS if any(c.isdigit() for c in text) else _PUNCTUATION


class Breakdown:
    """Adds up the losses of windows by part.

    Args:
        seq_length: Predicted tokens of a window.
        classes: Maps a window to the class of each of them.
    """

    def __init__(self, seq_length: int, classes: Callable[[torch.Tensor], Sequence[int]]) -> None:
        self._classes = classes
        bins = min(_BINS, seq_length)
        self._bin = torch.arange(seq_length) * bins // seq_length
        self._positions, self._of_class = [NOTHING] * bins, [NOTHING] * len(CLASSES)

    def add(self, window: torch.Tensor, losses: Losses) -> None:
        """Add the losses of a window, int64 [seq_length + 1]."""
        _add(self._positions, self._bin, losses)
        _add(self._of_class, torch.tensor(self._classes(window)), losses)

    @property
    def parts(self) -> Parts:
        """Return the figures; classes that do not occur are left out."""
        starts = [int((self._bin < i).sum()) for i in range(len(self._positions) + 1)]
        labels = [_span(a + 1, b) for a, b in pairwise(starts)]
        found = zip(CLASSES, self._of_class, strict=True)
        return Parts(
            len(self._bin),
            tuple(map(Part, labels, self._positions)),
            tuple(Part(label, sums) for label, sums in found if sums.tokens),
        )


def _add(totals: list[Sums], index_T: torch.Tensor, losses: Losses) -> None:
    flat = [torch.zeros(len(totals), dtype=torch.float64) for _ in range(3)]
    own = (losses.nll_T, losses.kl_T, torch.ones_like(losses.nll_T))
    for total, values in zip(flat, own, strict=True):
        total.index_add_(0, index_T, values.cpu())
    rows = zip(*(total.tolist() for total in flat), strict=True)
    for i, (nll, kl, tokens) in enumerate(rows):
        totals[i] += Sums(nll, kl, int(tokens))


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first} to {last}"
