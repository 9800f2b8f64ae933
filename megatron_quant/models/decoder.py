"""The facts of a decoder-only model that every table states, whatever its config calls them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding over the whole head.

    base: wavelength base (``rope_theta``).
    interpolation: positions are divided by it (rope_type "linear"); None where they are not.
    llama3_factor: factor of Llama 3's frequency scaling with its own constants (low 1, high 4,
        8192 original positions); None where it is not used.
    """

    base: float
    interpolation: float | None = None
    llama3_factor: float | None = None


@dataclass(frozen=True)
class Yarn:
    """YaRN of a rotary embedding, with DeepSeek's two scales of attention.

    factor: positions are divided by it, where a dimension turns slowly. original: positions of the
    model without it. fast, slow: turns over these positions, between which dimensions are mixed.
    mscale, mscale_all: ``0.1 m ln(factor) + 1`` of the first over that of the second scales q and k
    after the rotation; the square of the second's scales the softmax.
    """

    factor: float
    original: int
    fast: float
    slow: float
    mscale: float
    mscale_all: float


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: queries, keys and values from a token's compressed ones.

    q_rank: features of the compressed query; None where it is not compressed. kv_rank: of the
    compressed key and value. nope, rope: features of a head's query and key without and with the
    rotation, whose pairs lie side by side; value: of its value. yarn: None for plain rotation.
    """

    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int
    yarn: Yarn | None = None


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts layers.

    count: experts of a layer. topk: experts that a token visits. ffn: intermediate features.
    layers: for each layer of the model, whether it has experts.
    normalized: the probabilities of a token's chosen experts sum to one.
    shared_ffn: intermediate features of the expert that every token visits; 0 for none.
    sigmoid: how the router scores; None for softmax.
    """

    count: int
    topk: int
    ffn: int
    layers: tuple[bool, ...]
    normalized: bool
    names: ExpertNames
    shared_ffn: int = 0
    sigmoid: Sigmoid | None = None


@dataclass(frozen=True)
class Decoder:
    """A decoder with RMSNorm, rotary grouped-query attention and SiLU-gated MLPs, without biases.

    ffn: intermediate features of the layers that have no experts.
    qk_norm: each head of q and k is normalized before the rotation.
    tied: the output layer is the embedding.
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
    latent: Latent | None = None

    def has_experts(self, layer: int) -> bool:
        """Whether ``layer``'s MLP is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]

    @property
    def has_dense_mlp(self) -> bool:
        """Whether any layer has one MLP for all tokens."""
        return not all(self.has_experts(layer) for layer in range(self.layers))
