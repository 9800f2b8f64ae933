"""Place every rank of a model, and tell which piece of a logical parameter it holds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import lcm

from megatron_quant.errors import LayoutError
from megatron_quant.models import Domain, Parallel, Param, Stage, Stages

Replicas = tuple[tuple[int, ...], ...]
"""For each shard the ranks that hold it."""


@dataclass(frozen=True)
class Coord:
    """One rank's coordinates. Ranks with equal ones along the cuts of a parameter are replicas."""

    tp: int
    ep: int
    etp: int
    pp: int = 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parallel layout of all ranks that hold one model.

    Attributes:
        tp_size: Tensor-parallel size.
        ep_size: Expert-parallel size.
        etp_size: Expert tensor-parallel size.
        coords: Coordinates by rank in the model's group.
        experts: Experts per layer, 0 for a model without; split contiguously over ``ep_size``.
        stages: Layers of every pipeline rank; empty where there is one, which holds all.
        cp_size: Context-parallel size. Its ranks see other tokens, and hold the same parameters.
    """

    tp_size: int
    ep_size: int
    etp_size: int
    coords: tuple[Coord, ...]
    experts: int = 0
    stages: Stages = ()
    cp_size: int = 1

    @staticmethod
    def simulate(
        world: int, tp: int, ep: int, etp: int, experts: int = 0, stages: Stages = ()
    ) -> "Layout":
        """Return the layout that Megatron's default rank order gives ``world`` ranks.

        Dense: ``rank = tp + tp_size * (dp + dp_size * pp)``; experts: ``rank = etp + etp_size *
        (ep + ep_size * (edp + edp_size * pp))`` (``RankGenerator`` of
        megatron.core.parallel_state, order "tp-cp-ep-dp-pp").

        Raises:
            LayoutError: Where a size does not divide the world or the experts.
        """
        _check_sizes(world, tp, ep, etp, experts)
        pp = len(stages) or 1
        _check_pipeline(world, tp, ep * etp, pp)
        coords = (Coord(r % tp, r // etp % ep, r % etp, r * pp // world) for r in range(world))
        return Layout(
            tp_size=tp,
            ep_size=ep,
            etp_size=etp,
            coords=tuple(coords),
            experts=experts,
            stages=stages,
        )

    def sharing_sequences(self, cp: int) -> "Layout":
        """Return this layout with each sequence shared by ``cp`` ranks, else data parallel.

        They are consecutive among those with the same shards, so no coordinate changes.

        Raises:
            LayoutError: Where the data-parallel ranks are no multiple of ``cp``.
        """
        held = self.tp_size * self.pp_size
        if self.world // held % cp:
            raise LayoutError(
                f"--cp {cp}: with --tp {self.tp_size} and --pp {self.pp_size} it does not fill the "
                f"world size {self.world}; start a multiple of {held * cp} ranks or choose "
                "another --cp"
            )
        return replace(self, cp_size=cp)

    @property
    def world(self) -> int:
        """Return the number of ranks."""
        return len(self.coords)

    @property
    def pp_size(self) -> int:
        """Return the number of pipeline stages."""
        return len(self.stages) or 1

    def places(self, param: Param) -> tuple[tuple[int, int], ...]:
        """Return each (pipeline rank, chunk of it) that holds the parameter, at most one a rank."""
        if not self.stages:
            return ((0, 0),)
        first, last = (0, 0), (self.pp_size - 1, len(self.stages[-1]) - 1)
        if param.stage is not Stage.LAYER:
            both = (first, last)
            return {
                Stage.FIRST: (first,),
                Stage.LAST: (last,),
                Stage.ENDS: both,
                Stage.BOTH: both,
            }[param.stage]
        assert param.layer is not None, f"{param.name} has no layer, and names no stage"
        chunks = ((pp, i, held) for pp, s in enumerate(self.stages) for i, held in enumerate(s))
        return tuple((pp, chunk) for pp, chunk, held in chunks if param.layer in held)

    def shards(self, param: Param) -> int:
        """Count the pieces into which the parameter is cut (one expert's, if it is an expert's)."""
        if param.parallel is Parallel.REPLICATED:
            return 1
        return self.tp_size if param.domain is Domain.DENSE else self.etp_size

    def shard_of(self, param: Param, rank: int) -> tuple[int, int] | None:
        """Return the ``(shard_rank, shard_size)`` that ``rank`` holds; None if it holds nothing."""
        coord, size = self.coords[rank], self.shards(param)
        if param.domain is Domain.EXPERT and coord.ep != self._ep_of(param):
            return None
        if coord.pp not in dict(self.places(param)):
            return None
        return (_shard(coord, param.domain) if size > 1 else 0, size)

    def holders(self, param: Param) -> Replicas:
        """Return for each shard the ranks that hold a replica of it, ascending."""
        domain, ep, size = param.domain, self._ep_of(param), self.shards(param)
        stages = sorted({pp for pp, _ in self.places(param)})
        held = [
            [self._ranks_at[domain, ep, pp, shard if size > 1 else None] for pp in stages]
            for shard in range(size)
        ]
        return tuple(at[0] if len(at) == 1 else tuple(sorted(chain(*at))) for at in held)

    @cached_property
    def _ranks_at(self) -> Mapping[tuple[Domain, int, int, int | None], tuple[int, ...]]:
        """Map domain, expert rank (0 if dense), stage and shard (None for any) to ranks."""
        found: dict[tuple[Domain, int, int, int | None], list[int]] = {}
        for rank, coord in enumerate(self.coords):
            for domain in Domain:
                ep = coord.ep if domain is Domain.EXPERT else 0
                for shard in (_shard(coord, domain), None):
                    found.setdefault((domain, ep, coord.pp, shard), []).append(rank)
        return {key: tuple(ranks) for key, ranks in found.items()}

    def _ep_of(self, param: Param) -> int:
        assert (param.domain is Domain.EXPERT) == (param.expert is not None), param.name
        if param.expert is None or self.ep_size == 1:
            return 0
        assert param.expert < self.experts, f"{param.name}: the layout has {self.experts} experts"
        return param.expert // (self.experts // self.ep_size)


def _shard(coord: Coord, domain: Domain) -> int:
    return coord.tp if domain is Domain.DENSE else coord.etp


def _check_sizes(world: int, tp: int, ep: int, etp: int, experts: int) -> None:
    for name, size in (("tp", tp), ("ep", ep), ("etp", etp)):
        if size < 1:
            raise LayoutError(f"--{name} is {size}; it must be at least 1")
    if world % tp:
        raise LayoutError(
            f"--tp {tp} does not divide the world size {world};"
            f" start a multiple of {tp} ranks or choose another --tp"
        )
    if world % (ep * etp):
        raise LayoutError(
            f"--ep {ep} x --etp {etp} = {ep * etp} does not divide the world size {world};"
            f" start a multiple of {ep * etp} ranks or choose other sizes"
        )
    if experts and experts % ep:
        raise LayoutError(
            f"--ep {ep} does not divide the model's {experts} experts; choose a divisor of them"
        )


def _check_pipeline(world: int, tp: int, expert_ranks: int, pp: int) -> None:
    stage = lcm(tp, expert_ranks)
    if world % (stage * pp):
        raise LayoutError(
            f"--pp {pp} stages of {stage} ranks or a multiple of them do not fill the world size"
            f" {world}; start a multiple of {stage * pp} ranks or choose another --pp"
        )
