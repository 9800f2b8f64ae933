"""The head of the page: what a reader wants to know first."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_quant.report.facts import Evaluation, Facts, Quality, Quantized, Search, Sensitivity
from megatron_quant.report.families import most
from megatron_quant.report.layers import bits_of, cold_experts, experts_of, worst
from megatron_quant.report.markup import Markup, joined, tag
from megatron_quant.report.scales import plural, seconds, short, size, whole


@dataclass(frozen=True)
class Tile:
    """A figure of the verdict: its name, its value, a line on it, and how it is to be taken."""

    name: str
    value: str
    about: str
    state: str = ""  # "good" or "look" (something to look at); empty for neither


def verdict(facts: Facts) -> Markup:
    """Return the tiles of the verdict."""
    drawn = (_drawn(tile) for tile in tiles(facts))
    return tag("dl", {"class": "tiles"}, joined(drawn))


def _drawn(tile: Tile) -> Markup:
    sign = {"good": "✓ ", "look": "! "}.get(tile.state, "")
    return tag(
        "div",
        {"class": f"tile {tile.state}".strip()},
        tag("dt", {}, tile.name),
        tag("dd", {"class": "value"}, sign + tile.value),
        tag("dd", {}, tile.about),
    )


def tiles(facts: Facts) -> Iterator[Tile]:
    """Yield the figures, the most important one first."""
    if facts.quantized is not None:
        yield _sizes(facts.quantized)
    if facts.search is not None:
        yield _of_search(facts.search)
    if facts.quantized is not None:
        yield from _of_quantized(facts.quantized)
    if facts.sensitivity is not None:
        yield from _of_sensitivity(facts.sensitivity)
    if facts.evaluation is not None:
        yield from _of_evaluation(facts.evaluation)
    if facts.quantized is not None:
        phases = facts.quantized.seconds
        longest = max(phases, key=lambda name: phases[name], default="")
        about = f"most of it: {longest}, {seconds(phases[longest])}" if longest else ""
        yield Tile("Time", seconds(sum(phases.values())), about)


def _of_quantized(facts: Quantized) -> Iterator[Tile]:
    yield _error(facts)
    if experts_of(facts):
        yield _cold(facts)
    if facts.fake_quant is not None:
        yield from _quality(facts.fake_quant, "the fake-quantized model")


def _sizes(facts: Quantized) -> Tile:
    before, after = facts.bytes_before, facts.bytes_after
    if not before or not after:
        return Tile("Size", "–", "nothing was exported")
    bits = f"{short(bits_of(facts))} bits for each of all weights"
    about = f"from {size(before)}: {before / after:.2f} times smaller, {bits}"
    return Tile("Size", size(after), about)


def _error(facts: Quantized) -> Tile:
    found = worst(facts.weights)
    if found is None:
        why = (
            "nothing was compared" if facts.verified is not None else "the export was not verified"
        )
        return Tile("Worst relative error", "–", why)
    assert found.error is not None
    return Tile("Worst relative error", short(found.error), f"{found.name}, {found.format}")


def _cold(facts: Quantized) -> Tile:
    cold, total = cold_experts(facts), len(experts_of(facts))
    if not (facts.expert_tokens or facts.input_amax):
        return Tile("Cold experts", "–", "no data was run")
    if not cold:
        return Tile("Cold experts", "none", f"{plural(total, 'expert')}, all saw tokens", "good")
    layers = len({layer for layer, _ in cold})
    about = f"of {whole(total)} saw no token, in {plural(layers, 'layer')}"
    return Tile("Cold experts", whole(len(cold)), about, "look")


def _quality(quality: Quality, of: str) -> Iterator[Tile]:
    if quality.kl is not None:
        yield Tile("KL divergence", short(quality.kl), f"nats a token, {of}")
    yield Tile(
        "Perplexity", short(quality.perplexity, 5), f"{plural(quality.tokens, 'token')}, {of}"
    )


def _of_search(search: Search) -> Tile:
    return Tile(
        "Bits a weight",
        f"{search.bits:.3f}",
        f"at the places of the search; at most {search.bound:g} were allowed (cost {search.cost})",
    )


def _of_sensitivity(found: Sensitivity) -> Iterator[Tile]:
    if found.rows:
        row = most(found)
        yield Tile("Loses most", short(row.kl), f"{row.family} in {row.format}, KL in nats a token")
    families = len({row.family for row in found.rows})
    yield Tile("Families", whole(families), f"measured on {plural(found.tokens, 'token')}")


def _of_evaluation(found: Evaluation) -> Iterator[Tile]:
    yield from _quality(found.quality, "the checkpoint")
