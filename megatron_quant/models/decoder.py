"""The facts of a decoder-only model that every table states, whatever its config calls them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN of a rotary embedding (arXiv 2309.00071).

    factor: positions are divided by it, where a dimension turns slowly. original: positions of the
    model without it. fast, slow: turns over these positions, between which dimensions are mixed.
    mscale, mscale_all: ``0.1 m ln(factor) + 1`` of the first over that of the second scales q and k
    after the rotation; None for ``0.1 ln(factor) + 1``. truncate: the mixed dimensions begin and
    end at whole ones.
    """

    factor: float
    original: int
    fast: float
    slow: float
    mscale: float | None
    mscale_all: float | None
    truncate: bool = True


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding over the whole head.

    base: wavelength base (``rope_theta``).
    interpolation: positions are divided by it (rope_type "linear"); None where they are not.
    llama3_factor: factor of Llama 3's frequency scaling with its own constants (low 1, high 4,
        8192 original positions); None where it is not used.
    yarn: None where it is not used.
    """

    base: float
    interpolation: float | None = None
    llama3_factor: float | None = None
    yarn: Yarn | None = None


@dataclass(frozen=True)
class Window:
    """Sliding-window attention.

    tokens: that a query sees at most, its own included. layers: for each layer of the model,
    whether its window is that; others see all.
    """

    tokens: int
    layers: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention: queries, keys and values from a token's compressed ones.

    q_rank: features of the compressed query; None where it is not compressed. kv_rank: of the
    compressed key and value. nope, rope: features of a head's query and key without and with the
    rotation, whose pairs lie side by side; value: of its value.
    """

    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Hugging Face module names within a layer; ``{expert}`` stands for the expert's index.

    bias: the tensor that the router's choice adds to its scores. shared, shared_gate: the expert
    that every token visits, and the linear whose sigmoid weighs it. Empty for none.
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

    groups: into which the experts are divided; chosen: those of them that a token may visit, by
    the sum of each group's two best. scaling: factor of the probabilities.
    """

    groups: int
    chosen: int
    scaling: float


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture-of-experts layers.

    count: experts of a layer. topk: experts that a token visits. ffn: intermediate features.
    layers: for each layer of the model, whether it has experts.
    normalized: the probabilities of a token's chosen experts sum to one.
    clamp: limit of gate (from above) and up (on both sides) in ``(up + 1) * gate *
        sigmoid(1.702 gate)``, which then is the activation; None for ``up * silu(gate)``.
    shared_ffn: intermediate features of the expert that every token visits; 0 for none.
    sigmoid: how the router scores; None for softmax.
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

    ffn: intermediate features of the layers that have no experts.
    qk_norm: each head of q and k is normalized before the rotation.
    tied: the output layer is the embedding.
    biased: every linear but the output layer has a bias, routers included.
    qkv_bias: those of q, k and v alone have one.
    sinks: each head has a learned logit that takes part in its softmax, and no value.
    window: None where every layer sees all tokens.
    latent: None for the grouped-query attention of the other fields.
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

    def has_experts(self, layer: int) -> bool:
        """Whether ``layer``'s MLP is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]

    @property
    def has_dense_mlp(self) -> bool:
        """Whether any layer has one MLP for all tokens."""
        return not all(self.has_experts(layer) for layer in range(self.layers))
