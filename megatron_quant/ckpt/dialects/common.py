"""Questions that every dialect asks of a plan before it writes a config, and of one it reads."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron_quant.ckpt.dialects.base import Layer, ModuleFormat, layer_of
from megatron_quant.ckpt.dialects.expressions import Effort, Expression
from megatron_quant.engines.families import fused_names
from megatron_quant.errors import FormatError
from megatron_quant.fields import Fields
from megatron_quant.formats import CHANNEL, Format
from megatron_quant.recipes import OUTPUT, QuantPlan, Slot

LM_HEAD = "lm_head"
"""Output layer, always listed as unquantized: engines build a tied one though it has no tensor."""
EMBEDDING = "embed_tokens"
"""Last part of an embedding's name: a 2-D weight but no linear, whatever a config targets."""
_EXPERTS = re.compile(r"^(.*\bexperts)\.\d+\.")
_WEIGHT = re.compile(r"(^|\.)(gate_)?weight\d*$")
"""End of a weight's name; Megatron's has an expert's number, or is a shared expert's gate."""
_BLOCK = re.compile(r"^((?:.*\.)?experts)(?:\.\d+\..+)?$")
"""A block of routed experts: one of its linears, or its stacks."""


def format_of_modules(plan: QuantPlan) -> dict[str, ModuleFormat]:
    """Map Hugging Face module to format, for every module that ``plan`` quantizes.

    Raises:
        FormatError: Where there is none.
    """
    found = {
        module: ModuleFormat(decision.weights, decision.inputs)
        for decision in plan.quantized
        if decision.weights is not None
        for module in decision.slot.sources
    }
    if not found:
        raise FormatError(f"recipe {plan.recipe!r} quantizes no weight, so there is no format")
    return found


def named_formats(plan: QuantPlan) -> dict[str, ModuleFormat]:
    """Return :func:`format_of_modules`, and the same formats by engines' own names of modules.

    Configs that state formats by name list both.
    """
    called = {
        module: ModuleFormat(decision.weights, decision.inputs)
        for decision in plan.quantized
        if decision.weights is not None
        for module in decision.slot.called
    }
    return {**format_of_modules(plan), **called}


def formats_of(plan: QuantPlan) -> list[ModuleFormat]:
    """List the formats of ``plan``, the one of most modules first."""
    return [f for f, _ in Counter(format_of_modules(plan).values()).most_common()]


def only_format(plan: QuantPlan, dialect: str) -> ModuleFormat:
    """Return the one format of all modules that ``plan`` quantizes.

    Raises:
        FormatError: Where there is none, or more than one.
    """
    found = formats_of(plan)
    if len(found) > 1:
        listed = ", ".join(describe_format(f) for f in found)
        raise FormatError(
            f"recipe {plan.recipe!r} has {listed}, but a {dialect} checkpoint has one format: use "
            "one and exclude the other layers, or export compressed-tensors or modelopt"
        )
    return found[0]


def describe_format(fmt: ModuleFormat) -> str:
    """Return ``nvfp4 weights with nvfp4 inputs``, for messages."""
    inputs = f"with {fmt.inputs.name} inputs" if fmt.inputs else "without quantized inputs"
    return f"{fmt.weights.name}{_group(fmt.weights)} weights {inputs}"


def _group(weights: Format) -> str:
    if not weights.group_sizes:
        return ""
    return f" (group {'channel' if weights.group_size == CHANNEL else weights.group_size})"


def refuse_cache(plan: QuantPlan, dialect: str) -> None:
    """Raise FormatError where ``plan`` has an FP8 KV cache, which the dialect cannot express."""
    if plan.kv_cache:
        raise FormatError(
            f"a {dialect} checkpoint has no scales of a {plan.kv_cache} KV cache; export "
            "modelopt or compressed-tensors, or leave kv_cache out"
        )


def excluded(plan: QuantPlan) -> list[str]:
    """List Hugging Face names of all weights left alone, routers and lm_head included.

    These are matrices, and stacks of experts that are carried whole.

    Raises:
        FormatError: Where a layer's experts are only partly quantized. Engines run them as one
            kernel and read the format of the whole layer from one of them.
    """
    _refuse_partial_experts(plan)
    kept = [d.slot for d in plan.decisions if not d.quantized and _may_be_linear(d.slot)]
    names = [n for slot in kept for n in (*slot.sources, *slot.called)]
    head = [] if any(d.slot.fixed == OUTPUT for d in plan.quantized) else [LM_HEAD]
    return list(dict.fromkeys([*names, *head]))


def expert_blocks(plan: QuantPlan) -> list[str]:
    """List a pattern for each block of routed experts that ``plan`` leaves alone.

    vLLM and SGLang give a block without its own format the first one that they find under the
    block's parent, such as a shared expert's.
    """
    kept = (d.slot for d in plan.decisions if not d.quantized and _may_be_linear(d.slot))
    found = (_BLOCK.match(n) for slot in kept for n in (*slot.sources, *slot.called))
    return list(dict.fromkeys(f"{match[1]}*" for match in found if match is not None))


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2


def _may_be_linear(slot: Slot) -> bool:
    """Return whether engines may build it quantized: a weight, or a stack of experts' weights.

    A depthwise convolution, [channels, 1, kernel], is neither, and nor is a matrix that a module
    owns under another name than ``weight``: excluding its module would exclude what is in it.
    """
    stack = len(slot.shape) == 3 and slot.shape[1] > 1
    return stack or (_is_matrix(slot.shape) and _WEIGHT.search(slot.name) is not None)


def _refuse_partial_experts(plan: QuantPlan) -> None:
    seen: dict[str, tuple[bool, str]] = {}
    for decision in plan.decisions:
        for name in decision.slot.sources:
            match = _EXPERTS.match(name)
            if match is None or not _is_matrix(decision.slot.shape):
                continue
            quantized, first = seen.setdefault(match[1], (decision.quantized, name))
            if quantized != decision.quantized:
                raise FormatError(
                    f"{name} and {first} are not both quantized; engines run the experts of "
                    "a layer as one kernel: quantize all of a layer's experts or none"
                )


def refuse_substrings(plan: QuantPlan, names: list[str]) -> None:
    """Raise FormatError where one of ``names`` is part of a quantized module's name.

    vLLM takes the exclusions of some configs for plain substrings of the modules that it leaves
    alone, fused names included.
    """
    quantized = "\n".join(
        dict.fromkeys(
            p
            for d in plan.quantized
            for n in (*d.slot.sources, *d.slot.called)
            for p in _prefixes(n)
        )
    )
    for name in names:
        at = quantized.find(name)
        if at >= 0:
            end = quantized.find("\n", at)
            hit = quantized[quantized.rfind("\n", 0, at) + 1 : end if end >= 0 else None]
            raise FormatError(
                f"vLLM would leave quantized {hit} unquantized, since excluded {name} is a "
                "substring of its name; exclude both, quantize both, or export compressed-tensors"
            )


def _prefixes(module: str) -> tuple[str, ...]:
    parent, _, leaf = module.rpartition(".")
    return (module, *(f"{parent}.{name}" for name in fused_names((leaf,))))


def patterns(modules: Iterable[str]) -> list[str]:
    """Return regular expressions that match ``modules`` and engines' names of fused ones.

    There is one for each parent module. All experts of a layer have one, as engines rename their
    projections: either all experts of a layer are among ``modules`` or none.
    """
    parents: dict[str, list[str]] = {}
    for module in modules:
        if layer_of(module) is Layer.EXPERT:
            match = _EXPERTS.match(module)
            assert match is not None, module
            parents.setdefault(match[1], [])
        else:
            parent, _, leaf = module.rpartition(".")
            parents.setdefault(parent, []).append(leaf)
    return [_pattern(parent, leaves) for parent, leaves in parents.items()]


def _pattern(parent: str, leaves: list[str]) -> str:
    if not leaves:
        return rf"^{re.escape(parent)}(\..*)?$"
    prefix = re.escape(f"{parent}.") if parent else ""
    names = dict.fromkeys([*leaves, *fused_names(leaves)])
    return f"^{prefix}({'|'.join(map(re.escape, names))})$"


def is_skipped(names: tuple[str, ...]) -> Callable[[str], bool]:
    """Return a test of whether transformers leaves a module alone where a config lists ``names``.

    A name counts where a module's begins with it, as an expression, or ends with it.
    """
    effort = Effort()
    found = [Expression(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", effort) for name in names]
    return lambda module: module.endswith(names) or any(e.match(module) for e in found)


def stated(config: Mapping[str, Any]) -> Fields:
    """Return typed access to a ``quantization_config``; CheckpointError for malformed values."""
    return Fields(config, "quantization_config")


def linears(modules: Iterable[str]) -> list[str]:
    """Return those of ``modules``, which own a 2-D weight, that are linear layers."""
    return [m for m in modules if m.rpartition(".")[2] != EMBEDDING]
