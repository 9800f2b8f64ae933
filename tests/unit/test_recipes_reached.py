"""Slots that calibration tokens did not reach: one text for every way to calibrate."""

import pytest

from megatron_quant.errors import CalibrationError
from megatron_quant.formats.spec import get_format
from megatron_quant.recipes.plan import Decision, QuantPlan, Slot
from megatron_quant.recipes.reached import accept_cold, check_reached, largest_shared


def expert(index: int, part: str = "linear_fc1") -> Slot:
    name = f"decoder.layers.3.mlp.experts.{part}.weight{index}"
    return Slot(name=name, sources=("m",), shape=(4, 4), expert=index)


def test_the_largest_of_those_that_share() -> None:
    slots = (expert(0), expert(1), expert(0, "linear_fc2"))
    plan = QuantPlan("r", tuple(Decision(slot=slot, rule="rule") for slot in slots))
    amaxes = {slots[0].name: 1.0, slots[1].name: 3.0, slots[2].name: 2.0}
    assert largest_shared(plan, amaxes) == {slots[0].sharing: 3.0, slots[2].sharing: 2.0}


def test_a_layer_that_no_token_reached() -> None:
    check_reached([expert(0), expert(1)], {expert(0).sharing})
    with pytest.raises(CalibrationError) as error:
        check_reached([expert(0), expert(1, "linear_fc2")], {expert(0).sharing})
    assert str(error.value) == (
        "no calibration token reached decoder.layers.3.mlp.experts.linear_fc2: "
        "give more data with --calib-size"
    )


def test_cold_experts_are_counted_once_for_all_their_weights() -> None:
    cold = [expert(5), expert(5, "linear_fc2"), expert(7)]
    with pytest.raises(CalibrationError) as error:
        accept_cold(cold, layer_max=False)
    assert str(error.value) == (
        "expert 5 of decoder.layers.3.mlp.experts saw no calibration token (and 1 more experts): "
        "raise --calib-size, or take the layer's largest amax with --cold-experts layer-max"
    )
    assert accept_cold(cold, layer_max=True) == tuple(slot.name for slot in cold)
    assert accept_cold([], layer_max=False) == ()


@pytest.mark.parametrize(
    ("fmt", "algorithm", "tensor", "blocks"),
    [
        ("fp8", "mse", True, False),
        ("fp8", "max", False, False),
        ("nvfp4", "mse", False, True),
        ("nvfp4", "four_over_six", False, True),
        ("nvfp4", "max", False, False),
        (None, "mse", False, False),
    ],
)
def test_what_is_searched(fmt: str | None, algorithm: str, tensor: bool, blocks: bool) -> None:
    weights = None if fmt is None else get_format(fmt)
    found = Decision(slot=expert(0), rule="rule", weights=weights, algorithm=algorithm)
    assert (found.searches_tensor, found.searches_blocks) == (tensor, blocks)
