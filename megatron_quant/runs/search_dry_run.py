"""Plan a search by --stream without scoring anything."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_quant.errors import QuantError
from megatron_quant.runs.options import QuantizeOptions, check_unreported

if TYPE_CHECKING:
    from megatron_quant.search import Problem, ScoreMemory


@dataclass(frozen=True)
class PlannedSearch:
    """A search before anything is scored: the places, and what scoring them takes.

    tokens: those that are scored.
    """

    problem: "Problem"
    memory: "ScoreMemory"
    tokens: int


def planned_search(options: QuantizeOptions) -> PlannedSearch:
    """Plan from config.json and the weights' headers; raises as the search would before scoring."""
    if not options.stream:
        raise QuantError(
            "--dry-run plans a search by --stream alone: add it, or leave out --auto-quantize-bits"
        )
    check_unreported(options)
    from megatron_quant.models import positive, text_config
    from megatron_quant.runs.auto_quantize import plan_candidates
    from megatron_quant.runs.start import Unquantized
    from megatron_quant.search import score_memory

    job, plan = plan_candidates(options, 1, Unquantized())
    hidden = positive(text_config(job.hf_config), "hidden_size")
    itemsize, method = job.dtype.itemsize, options.auto.method
    memory = score_memory(job.params, plan.problem, hidden, itemsize, method)
    tokens = options.auto.score_size * options.calibration.seq_length
    return PlannedSearch(plan.problem, memory, tokens)
