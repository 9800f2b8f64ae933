"""Read multi-head latent attention out of transformers' configs."""

from megatron_quant.documents import shown
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.config import Config, only, positive, rope_dict
from megatron_quant.models.decoder import Latent, Rope


def read_latent(config: Config) -> Latent:
    """Read the sizes of latent attention.

    Norms of compressed queries, keys and values have the epsilon of all others, as in engines.
    transformers has 1e-6 there.

    Raises:
        ArchitectureError: Names the key that is missing or malformed.
    """
    q_rank = None if config.get("q_lora_rank") is None else positive(config, "q_lora_rank")
    return Latent(
        q_rank=q_rank,
        kv_rank=positive(config, "kv_lora_rank"),
        nope=positive(config, "qk_nope_head_dim"),
        rope=positive(config, "qk_rope_head_dim"),
        value=positive(config, "v_head_dim"),
    )


def check_rotation(config: Config, rope: Rope) -> None:
    """Raise ArchitectureError for a rotary embedding that Megatron-Core's MLA does not have."""
    if config.get("rope_interleave") is not True:
        raise ArchitectureError(
            f"rope_interleave={shown(config.get('rope_interleave'))} in config.json is not "
            "supported: Megatron-Core's latent attention rotates pairs that lie side by side; use "
            "--stream"
        )
    given = rope_dict(config)
    if rope.interpolation is not None or rope.llama3_factor is not None:
        only(given, "rope_type", ("default", "yarn"))
        only(given, "type", ("default", "yarn"))
    only(given, "truncate", (True,))
    if given.get("mscale_all_dim") and not given.get("mscale"):
        raise ArchitectureError(
            f"mscale_all_dim={shown(given['mscale_all_dim'])} without mscale in config.json is not "
            "supported by Megatron-Core; use --stream"
        )
