"""Places of ranks in a layout, and the shards of a parameter that they hold."""

from dataclasses import replace

import pytest

from megatron_quant.ckpt.plan.ranks import Coord, Layout
from megatron_quant.errors import LayoutError
from megatron_quant.models.spec import Domain, Parallel, Param, Role, Source, Stage

STAGES = (((0,), (2,)), ((1,), (3,)))  # two ranks of two chunks


def param(parallel: Parallel, expert: int | None = None) -> Param:
    domain = Domain.DENSE if expert is None else Domain.EXPERT
    source = Source("m.weight", (8, 8))
    return Param(
        name="m.weight",
        sources=(source,),
        shape=(8, 8),
        role=Role.LINEAR,
        parallel=parallel,
        domain=domain,
        expert=expert,
    )


def test_rank_order_is_megatrons():
    layout = Layout.simulate(8, tp=4, ep=2, etp=2, experts=4)
    assert [c.tp for c in layout.coords] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [c.etp for c in layout.coords] == [0, 1] * 4
    assert [c.ep for c in layout.coords] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert layout.coords[5] == Coord(tp=1, ep=0, etp=1, pp=0)


def test_rank_order_of_a_pipeline():
    layout = Layout.simulate(8, tp=2, ep=2, etp=1, experts=4, stages=STAGES)
    assert [c.pp for c in layout.coords] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [c.ep for c in layout.coords] == [0, 1, 0, 1] * 2
    assert layout.pp_size == 2 and Layout.simulate(8, 2, 2, 1).pp_size == 1


@pytest.mark.parametrize(
    ("stage", "layer", "places"),
    [
        (Stage.LAYER, 2, ((0, 1),)),
        (Stage.LAYER, 1, ((1, 0),)),
        (Stage.FIRST, None, ((0, 0),)),
        (Stage.LAST, None, ((1, 1),)),
        (Stage.ENDS, None, ((0, 0), (1, 1))),
    ],
)
def test_stages_hold_their_layers_and_the_ends_the_rest(stage, layer, places):
    layout = Layout.simulate(8, tp=2, ep=2, etp=1, experts=4, stages=STAGES)
    held = replace(param(Parallel.COLUMN), stage=stage, layer=layer)
    assert layout.places(held) == places
    ranks = [4 * pp + r for pp, _ in places for r in range(4)]
    assert layout.holders(held) == (tuple(ranks[::2]), tuple(ranks[1::2]))
    assert [r for r in range(8) if layout.shard_of(held, r)] == ranks


def test_experts_of_a_stage():
    layout = Layout.simulate(8, tp=2, ep=2, etp=1, experts=4, stages=STAGES)
    assert layout.holders(replace(param(Parallel.ROW, 3), layer=1)) == ((5, 7),)


def test_dense_shards():
    layout = Layout.simulate(4, tp=2, ep=1, etp=1)
    column, replicated = param(Parallel.COLUMN), param(Parallel.REPLICATED)
    assert [layout.shard_of(column, r) for r in range(4)] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert layout.holders(column) == ((0, 2), (1, 3))
    assert [layout.shard_of(replicated, r) for r in range(4)] == [(0, 1)] * 4
    assert layout.holders(replicated) == ((0, 1, 2, 3),)


def test_experts_are_split_contiguously():
    layout = Layout.simulate(8, tp=1, ep=2, etp=2, experts=4)
    for expert, ranks in (
        (0, (0, 1, 4, 5)),
        (1, (0, 1, 4, 5)),
        (2, (2, 3, 6, 7)),
        (3, (2, 3, 6, 7)),
    ):
        row = param(Parallel.ROW, expert)
        held = [r for r in range(8) if layout.shard_of(row, r) is not None]
        assert tuple(held) == ranks
        assert layout.holders(row) == (ranks[::2], ranks[1::2])
        assert layout.holders(param(Parallel.REPLICATED, expert)) == (ranks,)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 2, 1), (4, 2, 2), (2, 4, 2)]
)
@pytest.mark.parametrize("parallel", Parallel)
@pytest.mark.parametrize("expert", [None, 0, 5])
def test_holders_and_shard_of_agree(sizes, parallel, expert):
    layout = Layout.simulate(16, *sizes, experts=8)
    held = param(parallel, expert)
    for shard, ranks in enumerate(layout.holders(held)):
        assert ranks == tuple(
            r
            for r in range(layout.world)
            if layout.shard_of(held, r) == (shard, layout.shards(held))
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((6, 4, 1, 1), "--tp 4 does not divide the world size 6"),
        ((6, 1, 4, 1), "--ep 4 x --etp 1 = 4 does not divide the world size 6"),
        ((4, 1, 2, 4), "--ep 2 x --etp 4 = 8 does not divide the world size 4"),
        ((4, 1, 4, 1, 6), "--ep 4 does not divide the model's 6 experts"),
        ((4, 0, 1, 1), "--tp is 0"),
        ((2, 2, 1, 1, 0, STAGES), "--pp 2 stages of 2 ranks .* world size 2; start .* of 4 ranks"),
        ((6, 2, 3, 1, 3, STAGES), "--pp 2 stages of 6 ranks .* world size 6; start .* of 12"),
    ],
)
def test_sizes_that_do_not_divide(arguments, words):
    with pytest.raises(LayoutError, match=words):
        Layout.simulate(*arguments)
