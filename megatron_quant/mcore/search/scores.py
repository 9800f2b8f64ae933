"""Score batches on a live model: all ranks together, a few batches at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_quant.dist import sum_reduce
from megatron_quant.evaluation import nll_and_kl
from megatron_quant.mcore.model import LiveModel, run_backward, run_schedule, whole
from megatron_quant.mcore.search.calls import Seen
from megatron_quant.mcore.search.scope import LivePlace
from megatron_quant.search import Loss, check_loss, check_score, next_token_loss


def _first() -> bool:
    """Return whether this rank says what all that share its logits know."""
    return bool(mpu.get_tensor_model_parallel_rank() == mpu.get_context_parallel_rank() == 0)


@dataclass(frozen=True, kw_only=True)
class LiveScorer:
    """Scores batches by one of the search's methods.

    Attributes:
        model: The live model, with the quantizers of ``places``, all off, in
            :func:`activations_alone`.
        places: This rank's part of every place, in order.
        vocab_size: Tokens that the model knows, without padding.
        loss: The loss whose gradients score.
        method: ``gradient`` or ``kl_div``.
    """

    model: LiveModel
    places: Sequence[LivePlace]
    vocab_size: int
    method: str
    loss: Loss = next_token_loss

    @property
    def at_once(self) -> int:
        """Return how many batches fill the data-parallel ranks and the stages of the pipeline."""
        return int(
            mpu.get_data_parallel_world_size() * mpu.get_pipeline_model_parallel_world_size()
        )

    def __call__(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the scores of batches, fp64 [batches, options of all places]. Collective.

        Args:
            batches: int64 [B, S] each, equal on all ranks; ``at_once`` of them at most. They share
                the data-parallel ranks; where they do not suffice, some run twice and count once.

        Raises:
            CalibrationError: On every rank alike, for a loss or score that is not finite.
        """
        rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        own = range(rank, -(-len(batches) // size) * size, size)
        given = [batches[i % len(batches)] for i in own]
        score = self._gradients if self.method == "gradient" else self._divergences
        found = score(given)
        flat = torch.zeros(len(batches), found.shape[1], dtype=torch.float64)
        for i, row in zip(own, found, strict=True):
            if i < len(batches):
                flat[i] = row
        flat = sum_reduce(flat, self.model.groups)
        self._check(flat)
        return flat[:, 1:]

    def _check(self, flat: torch.Tensor) -> None:
        if self.method == "gradient":
            check_loss(flat[:, 0].sum().item())
        options = [(p.place, o) for p in self.places for o in p.place.options]
        for (place, option), score in zip(options, flat[:, 1:].sum(0).tolist(), strict=True):
            check_score(self.method, score, place.name, option.action)

    def _options(self) -> list[tuple[int, LivePlace, int]]:
        """Return (column, place, option) of all options that change something."""
        each = [(p, i) for p in self.places for i in range(len(p.place.options))]
        return [
            (column, place, i)
            for column, (place, i) in enumerate(each, start=1)
            if place.place.options[i].changes
        ]

    def _rows(self, batches: int) -> torch.Tensor:
        """Return zeros: a column for the loss, and one for each option."""
        options = sum(len(p.place.options) for p in self.places)
        return torch.zeros(batches, 1 + options, dtype=torch.float64)

    @torch.no_grad()
    def _divergences(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return this rank's part of the scores: all on the last stage, first of its shards."""
        found, chunks = self._rows(len(batches)), self.model.chunks
        collect = partial(whole, vocab_size=self.vocab_size)
        before = run_schedule(chunks, batches, collect)
        for column, place, option in self._options():
            with place.rounded(option):
                after = run_schedule(chunks, batches, collect)
            for i, (new, old) in enumerate(zip(after, before, strict=True)):
                labels = batches[i].flatten().to(new.device)
                kl = nll_and_kl(new.flatten(0, 1), old.flatten(0, 1), labels).kl
                found[i, column] = max(kl, 0.0) if _first() else 0.0
        return found

    def _gradients(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return this rank's part of the scores, and of the losses."""
        found = self._rows(len(batches))
        seen = {s.module: Seen(s.name) for p in self.places for s in p.scopes}
        hooks = [m.register_forward_hook(s.saw, with_kwargs=True) for m, s in seen.items()]
        try:
            with torch.enable_grad():
                losses = run_backward(self.model.chunks, batches, self._loss)
        finally:
            for hook in hooks:
                hook.remove()
        if _first() and losses:
            found[:, 0] = torch.tensor(losses, dtype=torch.float64)
        for column, place, option in self._options():
            for scope in place.scopes:
                for i, call in enumerate(seen[scope.module].calls(len(batches))):
                    score = call.score(scope.module, partial(place.rounded, option))
                    found[i, column] += score if scope.counted else 0.0
        return found

    def _loss(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the loss of this rank's logits [B, S, V / tp]."""
        every = gather_from_tensor_model_parallel_region(logits)
        return self.loss(every[..., : self.vocab_size].float(), ids.to(logits.device))
