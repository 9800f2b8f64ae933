"""Check, before a run writes anything, that its ranks have the same inputs and the same plan."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from megatron_quant.alike import check_alike, once_a_host
from megatron_quant.ckpt.plan import ExportPlan, Origin, digest_of_parts, source_digest
from megatron_quant.ckpt.read import Compared, compared_heads, remember_heads
from megatron_quant.ckpt.storage import resolve_source
from megatron_quant.ckpt.write import plan_digest
from megatron_quant.dist import Groups
from megatron_quant.errors import QuantError
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.settings import flags_of

_DIGITS = 12  # of a digest that a message shows


def check_options(options: object, groups: Groups) -> None:
    """Raise RankError, on every rank, if the ranks' options differ. Collective.

    options: a dataclass; its groups of settings are compared flag by flag.
    """
    check_alike(groups, **{name: str(value) for name, value in flags_of(options).items()})


def fetched(options: QuantizeOptions, groups: Groups) -> QuantizeOptions:
    """Return ``options`` with a directory as source; one rank per host fetches a hub id.

    That rank also reads the files that all others will read, so that they are in the host's memory,
    and compares head and embedding for all.
    Collective. Raises CheckpointError, on every rank, if there is no such source.
    """
    given = options.hf_model_id
    if given is None:
        return options

    def fetch() -> tuple[str, Compared]:
        code, weights = options.calibration.trust_remote_code, options.megatron_load_path is None
        source, heads = resolve_source(given, code, weights), Compared()
        if weights:
            with suppress(QuantError):  # reported where it is needed
                source_digest(source)
                heads = compared_heads(source)
        return str(source), heads

    directory, heads = once_a_host(groups, fetch)
    remember_heads(heads)
    return replace(options, hf_model_id=directory)


def check_plans(groups: Groups, origin: Origin, plan: ExportPlan | None) -> None:
    """Raise RankError, on every rank, if recipe, source or planned files differ. Collective.

    Sources are compared by config.json and by the names, sizes and headers of their files.
    """
    check_alike(
        groups,
        the_digest_of_the_recipe=origin.recipe[:_DIGITS],
        the_digest_of_the_source=origin.source[:_DIGITS],
        the_digest_of_the_plan=plan_digest(plan)[:_DIGITS] if plan else "",
    )


def check_tokens(groups: Groups, tokens: Sequence[torch.Tensor]) -> None:
    """Raise RankError, on every rank, if the ranks read different data. Collective."""
    digest = digest_of_parts(ids.contiguous().numpy().tobytes() for ids in tokens)
    check_alike(groups, the_digest_of_the_data=digest[:_DIGITS])
