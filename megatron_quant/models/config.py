"""Read a Hugging Face ``config.json``: typed keys, and one-line refusals."""

from collections.abc import Mapping
from typing import Any

from megatron_quant.documents import shown
from megatron_quant.errors import ArchitectureError
from megatron_quant.fields import MOST, Fields
from megatron_quant.models.decoder import Decoder, ExpertNames, Experts, Rope, Yarn

Config = Mapping[str, Any]

_LAYERS, _EXPERTS = 10_000, 10_000
"""Limits above any model's counts. A larger number is a mistake and would fill the memory."""


def fields(config: Config) -> Fields:
    """Return typed access to ``config``, which raises ArchitectureError for a malformed value."""
    return Fields(config, "config.json", ArchitectureError)


def positive(config: Config, key: str, most: int = MOST) -> int:
    """Return ``config[key]``, a whole number above zero; raise ArchitectureError otherwise."""
    return fields(config).count(key, most=most)


def positive_or(config: Config, key: str, default: int) -> int:
    """Return the whole number above zero at ``key``, or ``default`` without one."""
    return fields(config).count(key, default)


def experts_in(config: Config, key: str) -> int:
    """Return ``config[key]``, the number of a layer's experts.

    Raise ArchitectureError without one.
    """
    return positive(config, key, _EXPERTS)


def number(config: Config, key: str) -> float:
    """Return ``config[key]`` as a number above zero; raise ArchitectureError otherwise."""
    return fields(config).number(key)


def flag(config: Config, key: str) -> bool:
    """Return ``config[key]``, false where absent or null.

    Raises:
        ArchitectureError: Where the value is no boolean.
    """
    return fields(config).flag(key)


def only(config: Config, key: str, allowed: tuple[object, ...]) -> None:
    """Raise ArchitectureError where ``config[key]`` is given and is none of ``allowed``."""
    fields(config).only(key, allowed)


def full_attention(config: Config) -> None:
    """Raise ArchitectureError where ``sliding_window`` (tokens) hides a position of the model."""
    if config.get("sliding_window") is None:
        return
    window = positive(config, "sliding_window")
    if window < positive(config, "max_position_embeddings"):
        raise ArchitectureError(
            f"sliding_window={window} in config.json is not supported; set it to null (attention "
            f"then differs beyond {window} tokens) or use a model without it"
        )


def rope_dict(config: Config) -> dict[str, Any]:
    """Collect all that the config says of its rotary embedding in one object, in any spelling."""
    # transformers >= 5 writes rope_parameters; older versions rope_scaling beside rope_theta
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        raise ArchitectureError(
            f"rope_parameters={shown(rope)} in config.json must be one object for all layers"
        )
    top = {k: config[k] for k in ("rope_theta", "partial_rotary_factor") if k in config}
    return {**top, **{k: v for k, v in rope.items() if v is not None}}


def _llama3(rope: dict[str, Any]) -> Rope:
    fixed = {
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }
    for key, value in fixed.items():
        given = rope.get(key)
        if given != value or isinstance(given, bool):
            raise ArchitectureError(
                f"{key}={shown(given)} of rope_type 'llama3' in config.json is not supported, "
                f"Megatron-Core only has {value}; use a model without it"
            )
    return Rope(base=number(rope, "rope_theta"), llama3_factor=number(rope, "factor"))


def _yarn(rope: dict[str, Any]) -> Yarn:
    if (factor := rope.get("attention_factor")) is not None:
        raise ArchitectureError(
            f"attention_factor={shown(factor)} of rope_type 'yarn' in config.json is not "
            "supported, Megatron-Core derives it; remove it if it is 0.1 * ln(factor) + 1, or use "
            "a model without it"
        )
    scales = [number(rope, k) if rope.get(k) else None for k in ("mscale", "mscale_all_dim")]
    both = None not in scales
    return Yarn(
        factor=number(rope, "factor"),
        original=positive(rope, "original_max_position_embeddings"),
        fast=number({"beta_fast": 32.0, **rope}, "beta_fast"),
        slow=number({"beta_slow": 1.0, **rope}, "beta_slow"),
        mscale=scales[0] if both else None,
        mscale_all=scales[1] if both else None,
        truncate=flag({"truncate": True, **rope}, "truncate"),
    )


def read_rope(config: Config) -> Rope:
    """Read the rotary embedding from ``rope_parameters`` or ``rope_theta`` and ``rope_scaling``."""
    rope = rope_dict(config)
    only(rope, "partial_rotary_factor", (1,))
    kind = _rope_kind(rope)
    if kind == "default":
        return Rope(base=number(rope, "rope_theta"))
    if kind == "linear":
        return Rope(base=number(rope, "rope_theta"), interpolation=number(rope, "factor"))
    if kind == "llama3":
        return _llama3(rope)
    if kind == "yarn":
        return Rope(base=number(rope, "rope_theta"), yarn=_yarn(rope))
    raise ArchitectureError(
        f"rope_type={shown(kind)} in config.json is not supported, only 'default', "
        "'linear', 'llama3' and 'yarn' are; use a model without it, or remove rope_scaling to stay "
        "within the original context length"
    )


def _rope_kind(rope: dict[str, Any]) -> object:
    return rope.get("rope_type", rope.get("type", "default"))


def read_partial_rope(config: Config, part: float) -> Rope:
    """Read a rotary embedding over the first features of a head.

    Args:
        config: Content of config.json.
        part: The share that is rotated where config.json does not say so.

    Raises:
        ArchitectureError: For a share above 1, or a rotation that is scaled too.
    """
    rope = {"partial_rotary_factor": part, **rope_dict(config)}
    share = number(rope, "partial_rotary_factor")
    kind = _rope_kind(rope)
    if share > 1 or kind != "default":
        raise ArchitectureError(
            f"partial_rotary_factor={shown(share)} with rope_type {shown(kind)} in config.json is "
            "not supported: a part of a head, at most all of it, is rotated without scaling; "
            "correct config.json, or use --stream"
        )
    return Rope(base=number(rope, "rope_theta"), part=share)


def _heads(config: Config) -> tuple[int, int, int]:
    heads = positive(config, "num_attention_heads")
    groups = positive_or(config, "num_key_value_heads", heads)
    if heads % groups:
        raise ArchitectureError(
            f"num_key_value_heads={groups} in config.json does not divide "
            f"num_attention_heads={heads}; correct config.json"
        )
    hidden = positive(config, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise ArchitectureError(
            f"num_attention_heads={heads} in config.json does not divide hidden_size={hidden}; "
            "give head_dim"
        )
    return heads, groups, positive_or(config, "head_dim", hidden // heads)


def read_decoder(config: Config, *, qk_norm: bool, rope: Rope | None = None) -> Decoder:
    """Read the part of a :class:`Decoder` that all known configs spell alike (no experts).

    Args:
        config: Content of config.json with defaults filled in.
        qk_norm: Whether heads of q and k are normalized.
        rope: The rotary embedding; None for one over the whole head, which config.json describes.

    Raises:
        ArchitectureError: Names the key that is missing, malformed or not supported.
    """
    only(config, "hidden_act", ("silu",))
    only(config, "attention_bias", (False,))
    only(config, "mlp_bias", (False,))
    heads, groups, head_dim = _heads(config)
    return Decoder(
        layers=positive(config, "num_hidden_layers", _LAYERS),
        hidden=positive(config, "hidden_size"),
        heads=heads,
        query_groups=groups,
        head_dim=head_dim,
        ffn=positive(config, "intermediate_size"),
        vocab=positive(config, "vocab_size"),
        positions=positive(config, "max_position_embeddings"),
        epsilon=number(config, "rms_norm_eps"),
        qk_norm=qk_norm,
        tied=flag(config, "tie_word_embeddings"),
        rope=read_rope(config) if rope is None else rope,
    )


def experts_of_all_layers(config: Config, decoder: Decoder, names: ExpertNames) -> Experts:
    """Experts in every layer, chosen by normalized weights; config.json spells them as Mixtral's.

    Raises ArchitectureError as :func:`check_routing`, and for a key that is missing or malformed.
    """
    experts = Experts(
        count=experts_in(config, "num_local_experts"),
        topk=positive(config, "num_experts_per_tok"),
        ffn=decoder.ffn,
        layers=(True,) * decoder.layers,
        normalized=True,
        names=names,
    )
    check_routing(experts)
    return experts


def check_routing(experts: Experts) -> None:
    """Raise ArchitectureError for a choice of experts that Megatron-Core's router cannot make."""
    if experts.topk > experts.count:
        raise ArchitectureError(
            f"num_experts_per_tok={experts.topk} in config.json exceeds the {experts.count} "
            "experts of a layer; correct one of them"
        )
    if experts.topk == 1 and experts.normalized:
        # Megatron refuses a softmax over a single chosen expert, which has no gradient
        raise ArchitectureError(
            "num_experts_per_tok=1 in config.json with normalized probabilities is not supported "
            "by Megatron-Core's router; use a model that visits 2 experts or more"
        )
