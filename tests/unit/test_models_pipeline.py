"""How layers are dealt to the stages of a pipeline."""

import pytest

from megatron_quant.errors import LayoutError
from megatron_quant.models import Pipeline


def test_one_stage_says_nothing() -> None:
    assert Pipeline().stages(7) == ()


def test_even_and_uneven_stages() -> None:
    assert Pipeline(2).stages(4) == (((0, 1),), ((2, 3),))
    assert Pipeline(3, first=1).stages(7) == (((0,),), ((1, 2, 3),), ((4, 5, 6),))
    assert Pipeline(3, first=3, last=1).stages(5) == (((0, 1, 2),), ((3,),), ((4,),))
    assert Pipeline(2, first=1, last=3).stages(4) == (((0,),), ((1, 2, 3),))


def test_virtual_stages_are_dealt_in_turn() -> None:
    assert Pipeline(2, 2).stages(4) == (((0,), (2,)), ((1,), (3,)))
    assert Pipeline(2, 2, last=2).stages(6) == (((0, 1), (3, 4)), ((2,), (5,)))


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        (Pipeline(9), r"--pp 9 is more stages than the model has layers \(8\); give at most as"),
        (Pipeline(3), "--pp 3 does not divide the model's 8 layers; choose a divisor, or say with"),
        (Pipeline(3, first=3), "--num-layers-in-first-pipeline-stage 3 of 8 layers leave 5 to the"),
        (Pipeline(3, last=8), "-last-pipeline-stage 8 of 8 layers leave 0 .* at least one each"),
        (Pipeline(2, first=4, last=3), "-first-.* 4 and --num-.*-last-.* 3 of 8 layers leave 1 to"),
        (Pipeline(2, 3), "-per-pipeline-rank 3 does not divide the 4 layers of a pipeline rank"),
        (Pipeline(1, 2), "--num-virtual-stages-per-pipeline-rank 2 needs a pipeline: give --pp"),
        (Pipeline(1, first=1), "--num-layers-in-first-pipeline-stage 1 needs a pipeline: give"),
    ],
)
def test_what_cannot_be_dealt_is_refused(pipeline: Pipeline, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        pipeline.stages(8)
