"""Facts of runs that never were, in the shapes of real ones."""

import random
from collections.abc import Iterator

from megatron_quant.report import (
    Evaluation,
    Facts,
    Part,
    Quality,
    Quantized,
    Rule,
    Search,
    Weight,
    search_of,
    sensitivity_of,
)

VERSION = "0.0.0"
COLD = ((1, 3), (2, 0), (2, 5))
HIDDEN = 64
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_EXPERT = ("gate_proj", "up_proj", "down_proj")
_PHASES = {"plan": 0.4, "load": 21.0, "attach": 0.6, "calibrate": 73.5, "export": 35.25}


def _weight(name: str, slot: str, family: str, layer: int | None, **own: object) -> Weight:
    elements = HIDDEN * HIDDEN
    given = {"expert": None, "rule": "rule 1: nvfp4 *", "format": "nvfp4", "inputs": "nvfp4"}
    given |= {"elements": elements, "before": 2 * elements, "after": elements * 9 // 16}
    return Weight(
        name=name, slot=slot, family=family, layer=layer, **{"error": 0.1, **given, **own}
    )


def _plain(name: str, layer: int | None, family: str, rule: str) -> Weight:
    plain = {"rule": rule, "format": "", "inputs": "", "error": None, "after": 2 * HIDDEN**2}
    return _weight(f"{name}.weight", name, family, layer, **plain)


def _weights(layers: int, experts: int) -> Iterator[Weight]:
    dice = random.Random(0)
    yield _plain("model.embed_tokens", None, "model.embed_tokens", "embedding: never quantized")
    for layer in range(layers):
        at, mega = f"model.layers.{layer}", f"decoder.layers.{layer}"
        for linear in _LINEARS:
            error = 0.09 + dice.random() * 0.02
            slot = f"{mega}.linear_{'proj' if linear == 'o_proj' else 'qkv'}"
            family = f"self_attn.{linear}"
            fp8 = {"format": "fp8", "inputs": "fp8", "after": HIDDEN**2, "error": error / 4}
            own = fp8 if layer == 0 else {"error": error}
            yield _weight(f"{at}.{family}.weight", slot, family, layer, **own)
        yield _plain(f"{at}.mlp.gate", layer, "mlp.gate", "router: never quantized")
        for expert in range(experts):
            for linear in _EXPERT:
                slot = f"{mega}.fc{2 if linear == 'down_proj' else 1}.weight{expert}"
                name, family = f"{at}.mlp.experts.{expert}.{linear}", f"mlp.experts.{linear}"
                error = 0.095 + dice.random() * 0.01 + (0.08 if (layer, expert) == (1, 2) else 0)
                yield _weight(f"{name}.weight", slot, family, layer, expert=expert, error=error)
    yield _plain("lm_head", None, "lm_head", "output: never quantized")


def quantized(layers: int = 4, experts: int = 8) -> Quantized:
    """A run through Megatron, with three cold experts."""
    dice = random.Random(1)
    weights = tuple(_weights(layers, experts))
    tokens = {
        w.slot: 0 if (w.layer, w.expert) in COLD else 1 + int(dice.lognormvariate(6, 1))
        for w in weights
        if w.expert is not None
    }
    amaxes = {w.slot: dice.lognormvariate(1, 1) for w in weights if w.format}
    return Quantized(
        recipe="nvfp4",
        description="NVFP4 weights and activations.",
        dialect="modelopt",
        dtype="bfloat16",
        ranks=4,
        bytes_before=sum(w.before for w in weights),
        bytes_after=sum(w.after or 0 for w in weights),
        seconds=_PHASES,
        coverage=(
            Rule(rule="rule 1: nvfp4 *", action="nvfp4+nvfp4", weights=5, patterns={"*": 5}),
            Rule(rule="router: never quantized", action="exclude", weights=layers, patterns={}),
        ),
        weights=weights,
        weight_amax=amaxes,
        input_amax=amaxes,
        expert_tokens=tokens,
        cold_experts=tuple(s for s, n in tokens.items() if n == 0),
        left_out=("mtp.safetensors: weights that nothing names",),
        verified=len(weights),
        fake_quant=Quality(12.3456, 0.0123, 4096),
    )


def search(layers: int = 4) -> Search:
    """A search among two formats."""
    dice = random.Random(2)
    places = []
    for layer in range(layers):
        for family in ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.experts"):
            worst = dice.lognormvariate(0, 2)
            chosen = 0 if family == "mlp.experts" and layer else dice.choice((0, 1, 1, 2))
            kinds = (("nvfp4+nvfp4", "nvfp4", 4.5, worst), ("fp8+fp8", "fp8", 8.0, worst / 8))
            options = [
                {
                    "format": name,
                    "candidates": [candidate],
                    "bits": bits,
                    "score": score,
                    "chosen": i == chosen,
                }
                for i, (name, candidate, bits, score) in enumerate(
                    (*kinds, ("none", "none", 16.0, 0.0))
                )
            ]
            name = f"model.layers.{layer}.{family}"
            places.append(
                {"name": name, "family": family, "weights": 1000, "share": 1.0, "options": options}
            )
    total = sum(o["score"] for p in places for o in p["options"] if o["chosen"])
    bits = sum(o["bits"] for p in places for o in p["options"] if o["chosen"]) / len(places)
    top = sum(p["options"][0]["score"] for p in places)
    points = [4.5 + 11.5 * i / 24 for i in range(25)]
    curve = [{"bits": b, "score": top * ((16 - b) / 11.5) ** 6} for b in points]
    return search_of(
        {
            "version": 1,
            "method": "gradient",
            "unit": "sum over tokens of (gradient of the loss x change of the output)^2",
            "cost": "weight",
            "candidates": ["nvfp4", "fp8", "none"],
            "bound": 9.0,
            "bits": bits,
            "score": total,
            "places": places,
            "frontier": curve,
            "excluded": [{"name": "lm_head", "why": "no candidate quantizes it"}],
        }
    )


def evaluation() -> Evaluation:
    """Figures that fall with the position."""
    positions = tuple(
        Part(
            label=f"{16 * i + 1} to {16 * i + 16}",
            tokens=160,
            perplexity=30 / (1 + i) ** 0.3,
            kl=0.05 / (1 + i) ** 0.2,
        )
        for i in range(32)
    )
    names = ("words, first token", "words, later tokens", "digits", "punctuation", "line ends")
    classes = tuple(
        Part(label=name, tokens=1000 // (i + 1), perplexity=20.0 / (i + 1), kl=0.05 / (i + 1))
        for i, name in enumerate(names)
    )
    return Evaluation(
        quality=Quality(14.2, 0.031, 5120),
        text="heldout.txt",
        against="/models/Small-MoE",
        seq_length=512,
        positions=positions,
        classes=classes,
    )


def facts(layers: int = 4, experts: int = 8) -> Facts:
    """A run that searched and quantized."""
    return Facts(
        command="quantize",
        model="/models/Small-MoE",
        version=VERSION,
        quantized=quantized(layers, experts),
        search=search(layers),
    )


def sensitive() -> Facts:
    """Families of weights, and the cache, each alone."""
    rows = [
        ("attention", "nvfp4", 4000, 4.5, 0.02),
        ("experts", "nvfp4", 90000, 4.5, 0.04),
        ("experts", "fp8", 90000, 8.0, 0.005),
        ("KV cache", "fp8", 0, 8.0, 0.001),
    ]
    names = ("family", "format", "weights", "bits", "kl")
    document = {
        "version": 1,
        "tokens": 512,
        "rows": [dict(zip(names, row, strict=True)) for row in rows],
        "left_out": ["lm_head: no format quantizes it"],
    }
    found = sensitivity_of(document)
    return Facts(command="sensitivity", model="M", version=VERSION, sensitivity=found)


def evaluated() -> Facts:
    """An evaluation."""
    return Facts(command="eval", model="OUT", version=VERSION, evaluation=evaluation())
