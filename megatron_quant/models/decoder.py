"""The facts of a decoder-only model, under one name each, whatever its config calls them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN of a rotary embedding (arXiv 2309.00071).

    Attributes:
        factor: Divides the positions of dimensions that turn slowly.
        original: Positions of the model without YaRN.
        fast: Turns over the original positions above which a dimension keeps its positions.
        slow: Turns below which a dimension's positions are divided; those between are mixed.
        mscale: m of ``0.1 m ln(factor) + 1``. Its value over that of ``mscale_all`` scales q and k
            after the rotation. None for ``0.1 ln(factor) + 1``.
        mscale_all: m of the divisor.
        truncate: Whether the mixed dimensions begin and end at whole ones.
    """

    factor: float
    original: int
    fast: float
    slow: float
    mscale: float | None
    mscale_all: float | None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        base: Wavelength base (``rope_theta``).
        interpolation: Divides the positions (rope_type "linear"); None where they stay.
        llama3_factor: Factor of Llama 3's frequency scaling with its own constants (low 1, high 4,
            8192 original positions); None where it is not used.
        yarn: None where it is not used.
        part: Share of a head's features, its first ones, that are rotated.
    """

    base: float
    interpolation: float | None = None
    llama3_factor: float | None = None
    yarn: Yarn | None = None
    part: float = 1.0


@dataclass(frozen=True)
class Window:
    """Sliding-window attention.

    Attributes:
        tokens: Tokens that a query sees at most, its own included.
        layers: For each layer of the model, whether it has the window. Other layers see all.
    """

    tokens: int
    layers: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention: queries, keys and values from a token's compressed ones.

    Attributes:
        q_rank: Features of the compressed query; None where it is not compressed.
        kv_rank: Features of the compressed key and value.
        nope: Features of a head's query and key that are not rotated.
        rope: Features of them that are rotated; the two of a pair lie side by side.
        value: Features of a head's value.
    """

    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Gated delta nets: linear attention in place of attention.

    Attributes:
        layers: For each layer of the model, whether it has one.
        key_heads: Heads of queries and keys.
        value_heads: Heads of values, a multiple of those.
        key_dim: Features of a head's query and key.
        value_dim: Features of a head's value.
        kernel: Tokens of the convolution.
        grouped: Whether the checkpoint keeps the rows of each key head together (q, k, v and z of
            the first, then of the second); otherwise q, k and v of all heads are one linear.
    """

    layers: tuple[bool, ...]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    grouped: bool


MAMBA, ATTENTION, MLP, MOE = "M", "*", "-", "E"
"""Kinds of a hybrid model's layers, as ``hybrid_override_pattern`` spells them."""


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """Layers of one mixer each, some of which are Mamba-2; MLPs and experts have no gate.

    Attributes:
        kinds: The kind of each layer.
        heads: Mamba's heads.
        head_dim: Features of one.
        groups: Groups of heads that share B and C.
        state: Features of a group's B, and of its C.
        kernel: Tokens of the convolution.
        conv_bias: Whether the convolution has a bias.
        latent: Features of what routed experts see; 0 where that is the layer's input.
    """

    kinds: str
    heads: int
    head_dim: int
    groups: int
    state: int
    kernel: int
    conv_bias: bool
    latent: int


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Hugging Face module names within a layer; ``{expert}`` stands for the expert's index.

    Attributes:
        router: The router.
        gate: Gate projection of an expert; empty where experts have none.
        up: Up projection of an expert.
        down: Down projection of an expert.
        bias: Tensor that the router adds to its scores when it chooses; empty for none.
        shared: Expert that every token visits; empty for none.
        shared_gate: Linear whose sigmoid weighs the shared expert; empty for none.
    """

    router: str
    gate: str
    up: str
    down: str
    bias: str = ""
    shared: str = ""
    shared_gate: str = ""


@dataclass(frozen=True)
class Sigmoid:
    """Routing by the sigmoid of each expert's logit; a bias in float32 is added for the choice.

    Attributes:
        groups: Number of groups into which the experts are divided.
        chosen: Groups that a token may visit, chosen by the sum of each group's two best.
        scaling: Factor of the probabilities.
    """

    groups: int
    chosen: int
    scaling: float


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture-of-experts layers.

    Attributes:
        count: Experts of a layer.
        topk: Experts that a token visits.
        ffn: Intermediate features.
        layers: For each layer of the model, whether it has experts.
        normalized: Whether the probabilities of a token's chosen experts sum to one.
        names: Module names of the checkpoint.
        clamp: Limit of gate (from above) and up (on both sides) in ``(up + 1) * gate *
            sigmoid(1.702 gate)``, which then is the activation; None for ``up * silu(gate)``.
        shared_ffn: Intermediate features of the expert that every token visits; 0 for none.
        sigmoid: How the router scores; None for softmax.
    """

    count: int
    topk: int
    ffn: int
    layers: tuple[bool, ...]
    normalized: bool
    names: ExpertNames
    clamp: float | None = None
    shared_ffn: int = 0
    sigmoid: Sigmoid | None = None


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder with RMSNorm, rotary grouped-query attention and gated MLPs.

    Attributes:
        ffn: Intermediate features of the layers that have no experts.
        qk_norm: Whether each head of q and k is normalized before the rotation.
        tied: Whether the output layer is the embedding.
        biased: Whether every linear but the output layer has a bias, routers included.
        qkv_bias: Whether q, k and v alone have a bias.
        sinks: Whether each head has a learned logit that takes part in its softmax, with no value.
        window: Sliding window; None where every layer sees all tokens.
        latent: Latent attention; None for the grouped-query attention of the other fields.
        delta: Gated delta nets; None where no layer has one.
        gated: Whether a head's output is multiplied by the sigmoid of a gate, whose rows follow
            those of its query.
        centered: Whether weights of norms are stored less one, but for a delta net's own.
        hybrid: Layers of one mixer each; None where every layer has attention and an MLP.
    """

    layers: int
    hidden: int
    heads: int
    query_groups: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int
    epsilon: float
    qk_norm: bool
    tied: bool
    rope: Rope
    experts: Experts | None = None
    biased: bool = False
    qkv_bias: bool = False
    sinks: bool = False
    window: Window | None = None
    latent: Latent | None = None
    delta: DeltaNet | None = None
    gated: bool = False
    centered: bool = False
    hybrid: Hybrid | None = None

    def has_delta_net(self, layer: int) -> bool:
        """Return whether ``layer`` has a gated delta net in place of attention."""
        return self.delta is not None and self.delta.layers[layer]

    def has_experts(self, layer: int) -> bool:
        """Return whether ``layer``'s MLP is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]

    @property
    def has_dense_mlp(self) -> bool:
        """Return whether any layer has one MLP for all tokens."""
        if self.hybrid is not None:
            return MLP in self.hybrid.kinds
        return not all(self.has_experts(layer) for layer in range(self.layers))
