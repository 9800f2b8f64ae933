"""The export plan: files that no layout changes, and every byte owned once."""

import gc
import json
import weakref
from dataclasses import replace
from math import prod

import pytest
import torch

from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.ckpt.plan.export_plan import plan_export
from megatron_quant.ckpt.plan.placing import StorageRules
from megatron_quant.ckpt.plan.proof import check_plan, tiles
from megatron_quant.ckpt.plan.quantizable import slots
from megatron_quant.ckpt.plan.ranks import Layout
from megatron_quant.errors import ExportError, FormatError, LayoutError
from megatron_quant.formats.spec import get_format
from megatron_quant.models import Box, Domain, Parallel, Param, Role, Source, lookup
from megatron_quant.recipes.plan import Decision, QuantPlan
from tests.unit import ckpt_world as world


def test_slots_fix_what_is_no_linear():
    by_name = {slot.name: slot for slot in slots(world.model())}
    qkv = by_name["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert qkv.sources == tuple(f"model.layers.1.self_attn.{p}_proj" for p in "qkv")
    assert (qkv.shape, qkv.fixed) == ((256, 128), "")
    fixed = {slot.fixed for slot in by_name.values()}
    assert fixed == {"", "norm", "router", "embedding", "output"}
    assert by_name["decoder.layers.1.mlp.router.weight"].fixed == "router"


@pytest.mark.parametrize("recipe", world.RECIPES)
@pytest.mark.parametrize("layout", world.LAYOUTS)
def test_every_byte_has_one_owner(recipe, layout):
    plan = world.plan(recipe, layout)
    check_plan(plan)
    assert plan.files == world.plan(recipe, "tp1").files
    ranks = world.LAYOUTS[layout][0]
    assert sum(part.nbytes for r in range(ranks) for part in plan.parts_of(r)) == plan.bytes_after


@pytest.mark.parametrize("layout", world.LAYOUTS)
def test_owners_hold_what_they_write(layout):
    sizes = world.LAYOUTS[layout]
    where = Layout.simulate(*sizes, experts=world.EXPERTS)
    for part in world.plan("nvfp4", layout).parts:
        assert where.shard_of(part.param, part.owner) is not None


def test_replicas_share_the_work():
    plan = world.plan("fp8", "dp4")
    loads = [sum(part.nbytes for part in plan.parts_of(rank)) for rank in range(4)]
    assert max(loads) < 1.1 * min(loads)


def test_names_shapes_and_totals():
    plan = world.plan("int4", "tp1")
    entries = {entry.name: entry for entry in plan.entries}
    expert = "model.layers.1.mlp.experts.3.down_proj"
    assert entries[f"{expert}.weight_packed"].shape == (128, 8)
    assert entries[f"{expert}.weight_scale"].shape == (128, 2)
    assert entries[f"{expert}.weight_shape"].shape == (2,)
    assert entries["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    assert f"{expert}.weight" not in entries
    assert plan.bytes_before == 2 * sum(prod(s.shape) for p in world.model() for s in p.sources)
    assert plan.bytes_after == sum(entry.nbytes for entry in plan.entries)


def test_files_and_index():
    plan = world.plan("nvfp4", "tp1")
    count = len(plan.files)
    assert count > 2
    assert plan.files[0].name == f"model-00001-of-{count:05d}.safetensors"
    assert all(file.size - len(file.header) <= 40_000 for file in plan.files)
    assert plan.index["metadata"]["total_size"] == plan.bytes_after
    assert plan.index["weight_map"] == {entry.name: entry.file for entry in plan.entries}
    for target in plan.targets:
        assert len({entry.file for entry in target.entries}) == 1


def test_header_is_aligned_and_says_pt():
    (file,) = world.plan("nvfp4", "tp1", max_shard=10**9).files
    assert file.name == "model.safetensors"
    assert len(file.header) % 8 == 0
    header = json.loads(file.header[8:])
    assert header["__metadata__"] == {"format": "pt"}
    assert header["model.norm.weight"]["dtype"] == "BF16"
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in file.entries)


def test_a_tensor_larger_than_the_limit_gets_its_own_file():
    plan = world.plan("none", "tp1", max_shard=1)
    assert len(plan.files) == len(plan.entries)
    with pytest.raises(ExportError, match="--max-shard-size is 0"):
        world.plan("none", "tp1", max_shard=0)


def matrix(shape: tuple[int, int], parallel: Parallel, expert: int | None = None) -> Param:
    domain = Domain.DENSE if expert is None else Domain.EXPERT
    source = Source("model.layers.0.a.b.weight", shape)
    return Param(
        name="a.b.weight",
        sources=(source,),
        shape=shape,
        role=Role.LINEAR,
        parallel=parallel,
        domain=domain,
        expert=expert,
    )


@pytest.mark.parametrize(("expert", "axis"), [(None, "--tp 2"), (1, "--etp 2")])
def test_a_shard_that_splits_packed_elements(expert, axis):
    params = (matrix((8, 72), Parallel.ROW, expert),)
    with pytest.raises(LayoutError, match=r"a\.b\.weight: .* cuts its 72 inputs among 8") as caught:
        world.plan("int4", "tp2-etp2", params)
    assert axis in str(caught.value)
    assert "weight_packed stores in one element" in str(caught.value)
    check_plan(world.plan("int4", "tp1", params))


def test_a_row_pair_that_crosses_a_shard():
    with pytest.raises(LayoutError, match="cuts its 6 outputs among 2"):
        world.plan("int4-awq", "tp2", (matrix((6, 64), Parallel.COLUMN),))


@pytest.mark.parametrize("layout", ["tp2", "tp4"])
def test_a_group_that_crosses_a_shard_is_written_once(layout):
    params = (matrix((8, 96), Parallel.ROW),)
    plan = world.plan("int4", layout, params)
    check_plan(plan)
    assert plan.files == world.plan("int4", "tp1", params).files


@pytest.mark.parametrize(
    ("recipe", "shape", "words"),
    [
        ("int4", (8, 84), "its 84 inputs are not a multiple of 8, as weight_packed packs them"),
        ("nvfp4", (8, 24), "its 24 inputs are not a multiple of 16, as nvfp4 needs"),
        ("int4-awq", (7, 64), "its 7 outputs are not a multiple of 2"),
    ],
)
def test_a_shape_that_the_format_does_not_divide(recipe, shape, words):
    with pytest.raises(FormatError, match=words):
        world.plan(recipe, "tp1", (matrix(shape, Parallel.COLUMN),))


def test_a_vector_is_no_matrix():
    source = Source("x.weight", (32,))
    param = Param(
        name="x.weight",
        sources=(source,),
        shape=(32,),
        role=Role.LINEAR,
        parallel=Parallel.REPLICATED,
    )
    with pytest.raises(FormatError, match=r"x\.weight: fp8 needs a matrix"):
        world.plan("fp8", "tp1", (param,))


def test_tiles():
    def box(row: int, col: int, rows: int, cols: int) -> Box:
        return Box((row, col), (rows, cols))

    assert tiles((4, 4), (box(0, 0, 4, 2), box(0, 2, 2, 2), box(2, 2, 2, 2)))
    assert not tiles((4, 4), (box(0, 0, 4, 2),))
    assert not tiles((4, 4), (box(0, 0, 4, 4), box(0, 0, 4, 4)))
    assert not tiles((4, 4), (box(0, 0, 4, 2), box(0, 1, 4, 2)))
    assert not tiles((4, 4), (box(0, 0, 4, 2), box(0, 3, 4, 2)))
    assert tiles((), (Box((), ()),))
    assert not tiles((), ())


def test_check_plan_finds_what_is_wrong():
    plan = world.plan("nvfp4", "tp2")
    with pytest.raises(AssertionError, match="do not tile"):
        check_plan(replace(plan, parts=plan.parts[:-1]))
    with pytest.raises(AssertionError, match="do not tile"):
        check_plan(replace(plan, parts=(*plan.parts, plan.parts[0])))
    first = plan.files[0]
    with pytest.raises(AssertionError, match="starts at"):
        check_plan(replace(plan, files=(replace(first, entries=first.entries[1:]),)))
    with pytest.raises(AssertionError, match="tensors end at"):
        check_plan(replace(plan, files=(replace(first, size=first.size + 1),)))
    with pytest.raises(AssertionError, match="stored twice"):
        check_plan(replace(plan, files=(first, first)))


def test_a_model_of_a_hundred_thousand_tensors():
    config = world.CONFIG | {"num_hidden_layers": 94, "num_experts": 128, "mlp_only_layers": []}
    params = lookup(config).params(config)
    fmt = get_format("nvfp4")
    quant = QuantPlan(
        "large",
        tuple(
            Decision(slot=slot, rule="r")
            if slot.fixed
            else Decision(slot=slot, rule="r", weights=fmt)
            for slot in slots(params)
        ),
    )
    layout = Layout.simulate(16, 4, 8, 1, experts=128)
    plan = plan_export(
        params,
        quant,
        layout,
        StorageRules(
            dialect=get_dialect("modelopt"),
            dtype=torch.bfloat16,
            max_shard_bytes=10**8,
        ),
    )
    check_plan(plan)
    assert len(plan.entries) == len(set(plan.index["weight_map"])) > 94 * 128 * 3 * 3
    loads = [sum(part.nbytes for part in plan.parts_of(rank)) for rank in range(16)]
    assert max(loads) < 1.01 * min(loads)


def test_a_plan_that_is_dropped_leaves_nothing_behind() -> None:
    """What a plan worked out of its shapes goes with it; no cache of the module keeps it."""
    plan = world.plan("nvfp4", "tp2-ep2")
    check_plan(plan)
    schemes = [weakref.ref(target.scheme) for target in plan.targets]
    del plan
    gc.collect()
    assert schemes and all(scheme() is None for scheme in schemes)
