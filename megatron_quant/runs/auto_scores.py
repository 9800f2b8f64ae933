"""Describe the work of scoring, and keep its scores, however the model is run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_quant.alike import ids_once_a_host
from megatron_quant.ckpt.plan import digest_of_parts
from megatron_quant.dist import Groups, together
from megatron_quant.runs.agree import check_tokens
from megatron_quant.runs.batches import calibration_batches
from megatron_quant.runs.phases import Phases
from megatron_quant.runs.search_plan import SearchPlan
from megatron_quant.runs.settings import AutoQuantize, Calibration
from megatron_quant.search import Loss, ScoreStore, next_token_loss

_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of scoring.

    Attributes:
        plan: The search.
        auto: What was asked for.
        calibration: How static scales of inputs follow from the samples.
        batches: The samples, int64 [B, S] each; equal on all ranks.
        source: Digest of the model; empty if it is not known.
        dtype: Name of the dtype in which the model computes.
        loss: The loss whose gradients score.
        caches: Layer -> slots of its keys and values, where these are measured too.
    """

    plan: SearchPlan
    auto: AutoQuantize
    calibration: Calibration
    batches: Sequence[torch.Tensor]
    source: str
    dtype: str
    loss: Loss = next_token_loss
    caches: Mapping[int, Sequence[str]] = field(default_factory=dict)

    @property
    def options(self) -> int:
        """Return the number of options of all places."""
        return sum(len(p.options) for p in self.plan.problem.places)

    def opened(self, groups: Groups) -> ScoreStore | None:
        """Open the directory of scores, or make it; None if none are kept. Collective."""
        directory = self.auto.checkpoint
        store = None if directory is None else ScoreStore(directory)

        def begin() -> None:
            if store is not None and groups.rank == 0:
                store.begin(self.about, len(self.batches), self.plan.problem)

        together(groups, begin)
        return store

    @property
    def about(self) -> dict[str, str]:
        """Return what scores depend on, beside the places."""
        text = digest_of_parts(ids.contiguous().numpy().tobytes() for ids in self.batches)
        own = self.loss is not next_token_loss
        return {
            "method": self.auto.method,
            "model": self.source[:_DIGITS],
            "text": text[:_DIGITS],
            "dtype": self.dtype,
            "expert scales": self.plan.target.expert_scales,
            **({"head": self.auto.head.name} if self.auto.head is not None else {}),
            **({"loss": getattr(self.loss, "__qualname__", "its own")} if own else {}),
        }


def read_samples(
    calibration: Calibration, tokenizer: Path, vocab_size: int, groups: Groups, phases: Phases
) -> list[torch.Tensor]:
    """Return the batches of text, [B, S] each, which one rank of each host reads. Collective.

    Args:
        calibration: Says which text, and how many samples.
        tokenizer: The directory whose tokenizer is used if ``calibration`` names none.
        vocab_size: Tokens that the model knows.
    """
    with phases.time("load text"):
        batches = ids_once_a_host(
            groups, lambda: calibration_batches(calibration, tokenizer, vocab_size)
        )
        check_tokens(groups, batches)
    return batches


def read_kept(store: ScoreStore | None, batches: Iterable[int], found: torch.Tensor) -> list[int]:
    """Read the scores that are kept into ``found``; return the batches that have none."""
    missing = []
    for i in batches:
        if store is not None and store.has(i):
            found[i] = store.get(i, found.shape[1])
        else:
            missing.append(i)
    return missing
