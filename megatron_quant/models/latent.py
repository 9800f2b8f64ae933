"""Multi-head latent attention as transformers' configs describe it."""

from typing import Any

from megatron_quant.errors import ArchitectureError
from megatron_quant.models.config import Config, number, only, positive, rope_dict
from megatron_quant.models.decoder import Latent, Rope, Yarn


def read_latent(config: Config) -> tuple[Rope, Latent]:
    """The rotary embedding (its base) and the rest; ArchitectureError for what Megatron has not.

    Its norms of compressed queries, keys and values have the epsilon of all others, as in engines;
    transformers has 1e-6 there.
    """
    if config.get("rope_interleave") is not True:
        raise ArchitectureError(
            f"rope_interleave={config.get('rope_interleave')!r} in config.json is not supported: "
            "Megatron-Core's latent attention rotates pairs that lie side by side; use --stream"
        )
    rope = rope_dict(config)
    only(rope, "partial_rotary_factor", (1,))
    q_rank = None if config.get("q_lora_rank") is None else positive(config, "q_lora_rank")
    latent = Latent(
        q_rank=q_rank,
        kv_rank=positive(config, "kv_lora_rank"),
        nope=positive(config, "qk_nope_head_dim"),
        rope=positive(config, "qk_rope_head_dim"),
        value=positive(config, "v_head_dim"),
        yarn=_yarn(rope),
    )
    return Rope(number(rope, "rope_theta")), latent


def _yarn(rope: dict[str, Any]) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ArchitectureError(
            f"rope_type={kind!r} in config.json is not supported, only 'default' and 'yarn' are "
            "with latent attention; use a model without it, or --stream"
        )
    only(rope, "truncate", (True,))
    only(rope, "attention_factor", (None,))
    rope = {"beta_fast": 32, "beta_slow": 1, **rope}
    mscale, mscale_all = _mscales(rope)
    return Yarn(
        factor=number(rope, "factor"),
        original=positive(rope, "original_max_position_embeddings"),
        fast=number(rope, "beta_fast"),
        slow=number(rope, "beta_slow"),
        mscale=mscale,
        mscale_all=mscale_all,
    )


def _mscales(rope: dict[str, Any]) -> tuple[float, float]:
    """Both scales; transformers takes 1 and 0 for the first where only one is there."""
    given = {key: rope.get(key) or 0 for key in ("mscale", "mscale_all_dim")}
    if not given["mscale_all_dim"]:
        return 1.0, 0.0
    return number(given, "mscale"), number(given, "mscale_all_dim")
