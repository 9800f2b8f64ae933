"""What every dialect asks of a plan before it writes a config, and of a config when it reads."""

import re
from collections.abc import Iterable

from megatron_quant.ckpt.dialects.base import ModuleFormat
from megatron_quant.errors import FormatError
from megatron_quant.recipes.plan import QuantPlan

LM_HEAD = "lm_head"
"""Always listed as unquantized: a tied output layer is a linear to the engines, but no tensor."""
EMBEDDING = "embed_tokens"
"""Last part of the name of a 2-D weight that is no linear, whatever a config's target says."""
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


def only_format(plan: QuantPlan, dialect: str) -> ModuleFormat:
    """The one format of all that ``plan`` quantizes.

    Raises FormatError where there is none, or more than one.
    """
    found = list(dict.fromkeys(_formats(plan)))
    if not found:
        raise FormatError(f"recipe {plan.recipe!r} quantizes no weight, so there is no format")
    if len(found) > 1:
        listed = ", ".join(describe(f) for f in found)
        raise FormatError(
            f"mixed precision needs per-layer configs, which {dialect} export does not write: "
            f"recipe {plan.recipe!r} has {listed}; use one format and exclude the other layers"
        )
    return found[0]


def _formats(plan: QuantPlan) -> Iterable[ModuleFormat]:
    for decision in plan.quantized:
        assert decision.weights is not None
        yield ModuleFormat(decision.weights, decision.inputs)


def describe(fmt: ModuleFormat) -> str:
    """``nvfp4 weights with nvfp4 inputs``, for messages."""
    group = f" (group {fmt.weights.group_size})" if fmt.weights.name == "int4" else ""
    inputs = f"with {fmt.inputs.name} inputs" if fmt.inputs else "without quantized inputs"
    return f"{fmt.weights.name}{group} weights {inputs}"


def excluded(plan: QuantPlan) -> list[str]:
    """Hugging Face names of all 2-D weights that stay as they are, routers and lm_head included.

    Raises FormatError where a layer's experts are only partly quantized: engines run them as
    one kernel and read the format of the whole layer from one of them.
    """
    _refuse_partial_experts(plan)
    kept = [d.slot for d in plan.decisions if not d.quantized and _is_matrix(d.slot.shape)]
    return list(dict.fromkeys([n for slot in kept for n in slot.sources] + [LM_HEAD]))


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2


def _refuse_partial_experts(plan: QuantPlan) -> None:
    seen: dict[str, tuple[bool, str]] = {}
    for decision in plan.decisions:
        for name in decision.slot.sources:
            match = _EXPERT.match(name)
            if match is None or not _is_matrix(decision.slot.shape):
                continue
            quantized, first = seen.setdefault(match[1], (decision.quantized, name))
            if quantized != decision.quantized:
                raise FormatError(
                    f"{name} and {first} are not both quantized; engines run the experts of "
                    "a layer as one kernel: quantize all of a layer's experts or none"
                )


def linears(modules: Iterable[str]) -> list[str]:
    """Of modules that own a 2-D weight, those that are linear layers."""
    return [m for m in modules if m.rpartition(".")[2] != EMBEDDING]
