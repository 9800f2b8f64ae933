"""Before a run writes anything: its ranks have the same inputs, and mean to do the same."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from megatron_quant.alike import check_alike, once_a_host
from megatron_quant.calib import STDLIB, load_texts
from megatron_quant.ckpt.plan import ExportPlan, Origin, digest_of_parts, source_digest
from megatron_quant.ckpt.storage import resolve_source
from megatron_quant.ckpt.write import plan_digest
from megatron_quant.dist import Groups
from megatron_quant.errors import QuantError
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.settings import flags_of

_DIGITS = 12  # of a digest, on the screen


def check_options(options: object, groups: Groups) -> None:
    """Raise RankError, on every rank, where the ranks have other options. Collective.

    options: a dataclass, whose groups of settings count by their flags.
    """
    check_alike(groups, **{name: str(value) for name, value in flags_of(options).items()})


def fetched(options: QuantizeOptions, groups: Groups) -> QuantizeOptions:
    """``options`` whose source is a directory: one rank of each host fetches what is on the hub.

    It also reads what all others will, so that they find it in the host's memory. Collective.
    Raises CheckpointError, on every rank, where there is no such source.
    """
    given = options.hf_model_id
    if given is None:
        return options

    def fetch() -> str:
        source = resolve_source(given)
        with suppress(QuantError):  # whoever needs it says what is wrong
            source_digest(source)
        if options.calibration.dataset != STDLIB and not Path(options.calibration.dataset).exists():
            with suppress(QuantError):
                load_texts(options.calibration.dataset)
        return str(source)

    return replace(options, hf_model_id=once_a_host(groups, fetch))


def check_plans(groups: Groups, origin: Origin, plan: ExportPlan | None) -> None:
    """Raise RankError, on every rank, where another recipe, source or files are meant. Collective.

    Of a source config.json, and the names, sizes and headers of its files are compared.
    """
    check_alike(
        groups,
        the_digest_of_the_recipe=origin.recipe[:_DIGITS],
        the_digest_of_the_source=origin.source[:_DIGITS],
        the_digest_of_the_plan=plan_digest(plan)[:_DIGITS] if plan else "",
    )


def check_tokens(groups: Groups, tokens: Sequence[torch.Tensor]) -> None:
    """Raise RankError, on every rank, where the ranks read other data. Collective."""
    digest = digest_of_parts(ids.contiguous().numpy().tobytes() for ids in tokens)
    check_alike(groups, the_digest_of_the_data=digest[:_DIGITS])
