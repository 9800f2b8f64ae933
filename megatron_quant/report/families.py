"""The section on families of weights: what each loses in each format, alone."""

from megatron_quant.report.facts import FamilyLoss, Sensitivity
from megatron_quant.report.markup import Child, Markup, joined, tag
from megatron_quant.report.scales import Scale, scale_of, short, whole
from megatron_quant.report.tables import Column, bar, table


def most(found: Sensitivity) -> FamilyLoss:
    """Return the family and format that loses most."""
    return max(found.rows, key=lambda row: row.kl)


def losses(found: Sensitivity) -> Markup:
    """Return the divergence of each family in each format."""
    scale = Scale(0.0, scale_of(row.kl for row in found.rows).high)
    rows: list[list[Child]] = [
        [
            row.family,
            row.format,
            whole(row.weights) if row.weights else "–",
            f"{row.bits:.3f}",
            short(row.kl, 4),
            bar([("now", scale.at(row.kl))], f"KL {short(row.kl)}"),
        ]
        for row in found.rows
    ]
    columns = (
        *(Column("Family"), Column("Format"), Column("Weights", True), Column("Bits", True)),
        *(Column("KL", True), Column("KL as a bar")),
    )
    said = (
        "One family is quantized and everything else is left as it is: the KL divergence of a "
        f"token's logits, in nats, over {whole(found.tokens)} tokens."
    )
    lines = (tag("li", {}, line) for line in found.left_out)
    left = [tag("h3", {}, "Not measured"), tag("ul", {}, *lines)] if found.left_out else []
    return joined([tag("p", {}, said), table("Loss of each family alone", columns, rows), *left])
