"""``--act-percentile`` is a percentage."""

import pytest

from megatron_quant.errors import QuantError
from megatron_quant.runs.options import QuantizeOptions


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
def test_a_percentile_that_is_none(percentile: float) -> None:
    with pytest.raises(QuantError, match=r"--act-percentile is .*: give a percentage above 0"):
        QuantizeOptions.from_flags(
            hf_model_id="model", export_quant_cfg="fp8", act_percentile=percentile
        )


def test_percentiles() -> None:
    assert (
        QuantizeOptions.from_flags(
            hf_model_id="model", export_quant_cfg="fp8"
        ).calibration.act_percentile
        == 100
    )
    assert (
        QuantizeOptions.from_flags(
            hf_model_id="model", export_quant_cfg="fp8", act_percentile=99.9
        ).calibration.act_percentile
        == 99.9
    )
