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
class ExpertNames:
    """Hugging Face module names within a layer; ``{expert}`` stands for the expert's index."""

    router: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts layers.

    count: experts of a layer. topk: experts that a token visits. ffn: intermediate features.
    layers: for each layer of the model, whether it has experts.
    normalized: the probabilities of a token's chosen experts sum to one.
    """

    count: int
    topk: int
    ffn: int
    layers: tuple[bool, ...]
    normalized: bool
    names: ExpertNames


@dataclass(frozen=True)
class Decoder:
    """A decoder with RMSNorm, rotary grouped-query attention and SiLU-gated MLPs, without biases.

    ffn: intermediate features of the layers that have no experts.
    qk_norm: each head of q and k is normalized before the rotation.
    tied: the output layer is the embedding.
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

    def has_experts(self, layer: int) -> bool:
        """Whether ``layer``'s MLP is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]

    @property
    def has_dense_mlp(self) -> bool:
        """Whether any layer has one MLP for all tokens."""
        return not all(self.has_experts(layer) for layer in range(self.layers))
