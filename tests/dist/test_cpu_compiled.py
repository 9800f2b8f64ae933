"""A compiled Transformer Engine with our kernels in it, through its own hook: make test-te."""

import inspect
import os
import re

import pytest

from megatron_quant import cpu
from megatron_quant.cpu import binary, kernels, plugin
from tests.dist.pool import Ranks
from tests.dist.test_cpu_models import _step

pytestmark = pytest.mark.skipif(
    os.environ.get(plugin.VARIABLE) != plugin.NAME, reason="a compiled TE: run make test-te"
)


def _enums() -> dict[str, dict[str, int]]:
    """Of Transformer Engine's binary part, as far as the stand-in has them."""
    import transformer_engine_torch as tex

    assert tex.__file__.endswith(".so")
    return {
        name: {member: int(value) for member, value in getattr(tex, name).__members__.items()}
        for name in (*binary._COUNTED, *binary._NUMBERED)
    }


def _parameters() -> dict[str, list[str]]:
    """Name of a kernel to the parameters of the binary function that it replaced."""
    docs = {name: plugin.REPLACED[name].__doc__ or "" for name in kernels._KERNELS}
    return {
        name: re.findall(r"[(,] ?(\w+): ", doc.partition(" -> ")[0]) for name, doc in docs.items()
    }


def _calls_of_a_step() -> dict[str, int]:
    _step(1, 1, 1, 4)
    return cpu.calls()


def test_the_kernels_are_called(ranks: Ranks) -> None:
    (calls,) = ranks(1, _calls_of_a_step)
    for kernel in ("te_general_grouped_gemm", "generic_gemm", "rmsnorm_fwd", "rmsnorm_bwd"):
        assert calls[kernel], kernel


def test_the_stand_ins_enums_are_transformer_engines(ranks: Ranks) -> None:
    (enums,) = ranks(1, _enums)
    stand_in = binary._stand_in("2.20.2")
    for name, members in enums.items():
        ours = {member.name: member.value for member in getattr(stand_in, name)}
        assert ours.items() <= members.items(), name


def test_the_kernels_take_transformer_engines_arguments(ranks: Ranks) -> None:
    (parameters,) = ranks(1, _parameters)
    for name, theirs in parameters.items():
        ours = list(inspect.signature(kernels._KERNELS[name]).parameters)
        assert len(ours) == len(theirs), (name, ours, theirs)
