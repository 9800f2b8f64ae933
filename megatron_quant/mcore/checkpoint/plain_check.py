"""Whether a training checkpoint holds the model of config.json, and what is so if it does not."""

import re
from collections.abc import Iterable, Mapping, Sequence

from megatron_quant.errors import CheckpointError
from megatron_quant.mcore.checkpoint.plain_keys import KeyPlace
from megatron_quant.mcore.checkpoint.torch_dist import TorchDist
from megatron_quant.models import Param, Role, num_experts, num_layers

_EMBEDDING = "embedding.word_embeddings.weight"
_BESIDE = re.compile(
    r"(chained_\d+\.)?optimizer(\.|$).*|(opt_param_scheduler|rng_state|rerun_state_machine_state"
    r"|args|train_state)([./].*)?|.*\._extra_state(/.*)?"
)
"""Keys that are no weights of a model."""
_LAYER = re.compile(r"decoder\.layers\.(\d{1,9})\.")
_EXPERT = re.compile(r"decoder\.layers\.(?:\d+\.)?mlp\.experts\.(?:local_)?experts\.(\d{1,9})\.")
_PARTS = tuple(
    (re.compile(pattern), said)
    for pattern, said in (
        (r"\.shared_experts\.", "a shared expert"),
        (r"\.mlp\.experts\.", "experts"),
        (r"(^|\.)output_layer\.weight$", "an output layer that is not the embedding"),
        (r"\.router\.expert_bias$", "a bias of the router"),
        (r"\.self_attention\.(in_proj|conv1d)\.", "gated delta nets"),
        (r"\.mixer\.(in_proj|conv1d)\.", "Mamba layers"),
        (r"\.fc[12]_latent_proj\.", "linears around the experts"),
        (r"\.[qk]_layernorm\.weight$", "norms of queries and keys"),
        (r"(^|\.)mtp\.", "layers for speculation (mtp)"),
    )
)
"""Parts of a model by the names of their parameters."""
_GIVE = "give the config.json of this very model"
_LACKS = f"the config has {{part}}, the checkpoint has not: {_GIVE}"
_HAS = (
    f"the checkpoint has {{part}} ({{name}}), the config has not: {_GIVE}, or leave such keys out "
    "with --skip-keys"
)
_VOCABULARY = (Role.EMBEDDING, Role.OUTPUT)


def prefix_of(stored: TorchDist) -> str:
    """Return what stands before Megatron's names in the keys, such as ``module.``.

    Raises CheckpointError where no language model is among them, or more than one.
    """
    found = {
        key.removesuffix(_EMBEDDING)
        for key in stored.shapes
        if key.endswith(_EMBEDDING) and not _is_beside(key)
    }
    if not found:
        raise CheckpointError(
            f"{stored.path} has no key that ends with {_EMBEDDING}: give a "
            "checkpoint of a GPTModel or a MambaModel"
        )
    if len(found) > 1:
        one, other = sorted(found)[:2]
        raise CheckpointError(
            f"{stored.path} has two models, {one}{_EMBEDDING} and {other}{_EMBEDDING}: leave one "
            f"out with --skip-keys '{other or one}*'"
        )
    return found.pop()


def check_plain_keys(
    stored: TorchDist,
    prefix: str,
    params: Sequence[Param],
    places: Mapping[str, tuple[KeyPlace, ...]],
) -> None:
    """Raise CheckpointError unless the checkpoint holds ``params``, and no weight beyond them.

    places: where each was found, by its name.
    """
    path = stored.path
    _check_counts(stored, prefix, params)
    known = {prefix + place.key for found in places.values() for place in found}
    beyond = sorted(k for k in stored.shapes.keys() - known if not _is_beside(k))
    missing = [param for param in params if not places[param.name]]
    names, keys = [param.name for param in params], [k for k in stored.shapes if not _is_beside(k)]
    _explain_part(path, [param.name for param in missing], keys, _LACKS)
    _explain_part(path, beyond, names, _HAS)
    if missing:
        raise CheckpointError(
            f"{path} has no {prefix}{missing[0].live} ({len(missing)} missing in all), which the "
            f"model of config.json has: {_GIVE}"
        )
    if beyond:
        raise CheckpointError(
            f"{path} has {beyond[0]} ({len(beyond)} such), which the model of config.json has not: "
            f"{_GIVE}, or leave it out with --skip-keys '{_pattern(beyond[0], known)}'"
        )
    for param in params:
        for place in places[param.name]:
            _check_shape(stored, prefix + place.key, place.shape, param)
            if not stored.is_own and place.part is None:
                _check_order(stored, prefix + place.key, param)


def _check_counts(stored: TorchDist, prefix: str, params: Sequence[Param]) -> None:
    """Raise CheckpointError where the numbers in keys count other layers or experts."""
    keys = [key for key in stored.shapes if key.startswith(prefix) and not _is_beside(key)]
    for what, pattern, stated in (
        ("layers", _LAYER, num_layers(params)),
        ("experts a layer", _EXPERT, num_experts(params)),
    ):
        numbers = (pattern.match(key, len(prefix)) for key in keys)
        count = max((int(number[1]) + 1 for number in numbers if number), default=stated)
        if stated and count != stated:
            raise CheckpointError(
                f"{stored.path} has {count} {what}, config.json {stated}: {_GIVE}"
            )


def _is_beside(key: str) -> bool:
    return _BESIDE.fullmatch(key) is not None


def _explain_part(path: object, odd: Iterable[str], others: Sequence[str], said: str) -> None:
    """Raise CheckpointError where a name of ``odd`` is of a part that none of ``others`` is of."""
    for name in odd:
        for pattern, part in _PARTS:
            if pattern.search(name) and not any(map(pattern.search, others)):
                raise CheckpointError(f"{path}: {said.format(part=part, name=name)}")


def _pattern(key: str, known: Iterable[str]) -> str:
    """Return a pattern for --skip-keys that matches ``key`` and its like, and none of ``known``."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        start = ".".join(parts[:end]) + "."
        if not any(k.startswith(start) for k in known):
            return f"{start}*"
    return key


def _check_order(stored: TorchDist, key: str, param: Param) -> None:
    """Refuse parts in one tensor, whose rows a run without dist_checkpointing has by rank."""
    parts = "gate and up" if len(param.sources) == 2 and not param.groups else ""
    if parts := " and ".join(param.kept) or parts:
        raise CheckpointError(
            f"{stored.path}: {key} has the rows of {parts} in the order of the run's tensor "
            "parallel ranks, which nothing says: save the run as torch_dist (--ckpt-format)"
        )


def _check_shape(stored: TorchDist, key: str, expected: tuple[int, ...], param: Param) -> None:
    shape = stored.shapes[key]
    padded = param.role in _VOCABULARY and shape[:1] >= expected[:1] and shape[1:] == expected[1:]
    if shape != expected and not padded:
        raise CheckpointError(
            f"{stored.path}: {key} is {list(shape)}, and config.json makes it {list(expected)}: "
            f"{_GIVE}"
        )
