"""Read mixtures whose router takes the sigmoid of every logit and a bias, as DeepSeek-V3's does."""

from megatron_quant.documents import shown
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.config import Config, experts_in, flag, number, only, positive
from megatron_quant.models.decoder import ExpertNames, Experts, Sigmoid

NAMES = ExpertNames(
    router="mlp.gate",
    gate="mlp.experts.{expert}.gate_proj",
    up="mlp.experts.{expert}.up_proj",
    down="mlp.experts.{expert}.down_proj",
    bias="mlp.gate.e_score_correction_bias",
    shared="mlp.shared_experts",
)

_KINDS = {"dense": False, "sparse": True}


def read_experts(config: Config, layers: int, dense: int, names: ExpertNames = NAMES) -> Experts:
    """Read the experts of a model that spells them as DeepSeek-V3 does.

    Args:
        config: Content of config.json with defaults filled in.
        layers: Number of the model's layers.
        dense: First layers without experts where config.json does not say how many.
        names: Module names of the experts.

    Raises:
        ArchitectureError: Names the key that is missing, malformed, or of a router that
            Megatron-Core does not have.
    """
    only(config, "scoring_func", ("sigmoid",))
    only(config, "topk_method", ("noaux_tc",))
    only(config, "moe_layer_freq", (1,))
    ffn = positive(config, "moe_intermediate_size")
    experts = Experts(
        count=experts_in(config, "n_routed_experts"),
        topk=positive(config, "num_experts_per_tok"),
        ffn=ffn,
        layers=_layers(config, layers, dense),
        normalized=flag(config, "norm_topk_prob"),
        names=names,
        shared_ffn=ffn * positive(config, "n_shared_experts"),
        sigmoid=Sigmoid(
            positive(config, "n_group"),
            positive(config, "topk_group"),
            number(config, "routed_scaling_factor"),
        ),
    )
    _check_routing(experts)
    return experts


def _layers(config: Config, layers: int, dense: int) -> tuple[bool, ...]:
    """Return for each layer whether it has experts, by either of the keys that say so."""
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return _after_dense(config.get("first_k_dense_replace", dense), layers)
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in _KINDS for k in kinds):
        raise ArchitectureError(
            f"mlp_layer_types={shown(kinds)} in config.json must name one of "
            f"{' and '.join(_KINDS)} for each of {layers} layers"
        )
    chosen = tuple(_KINDS[kind] for kind in kinds)
    if not any(chosen):
        raise ArchitectureError(
            "mlp_layer_types in config.json leaves no layer with experts; correct it"
        )
    first = config.get("first_k_dense_replace")
    if first is not None and chosen != _after_dense(first, layers):
        raise ArchitectureError(
            f"mlp_layer_types and first_k_dense_replace={shown(first)} in config.json name "
            "different layers with experts; correct one of them"
        )
    return chosen


def _after_dense(dense: object, layers: int) -> tuple[bool, ...]:
    if type(dense) is not int or not 0 <= dense < layers:
        raise ArchitectureError(
            f"first_k_dense_replace={shown(dense)} in config.json must be a whole number from 0 to "
            f"{layers - 1}, so that a layer has experts"
        )
    return tuple(i >= dense for i in range(layers))


def _check_routing(experts: Experts) -> None:
    """Raise ArchitectureError for a choice of experts that Megatron-Core's router cannot make."""
    assert experts.sigmoid is not None
    groups, chosen, topk = experts.sigmoid.groups, experts.sigmoid.chosen, experts.topk
    if experts.count % groups or chosen > groups or topk > experts.count // groups * chosen:
        raise ArchitectureError(
            f"n_group={groups}, topk_group={chosen} and num_experts_per_tok={topk} in config.json "
            f"do not fit {experts.count} experts; correct them"
        )
    if groups > 1 and topk // chosen != 2:
        raise ArchitectureError(
            f"topk_group={chosen} with num_experts_per_tok={topk} in config.json is not supported: "
            f"Megatron-Core chooses groups by their best {topk // chosen}, the model by their best "
            "2; use a model with twice as many experts per token as groups, or --stream"
        )
    if experts.normalized is not (topk > 1):
        raise ArchitectureError(
            f"norm_topk_prob={experts.normalized} with num_experts_per_tok={topk} in config.json "
            "is not supported by Megatron-Core, whose router always normalizes sigmoid scores of "
            "several experts and never of one; use another model, or --stream"
        )
