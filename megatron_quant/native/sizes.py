"""Sizes that stand for something else, read by both the formats and the C loops."""

WHOLE = 0
"""Size of a block that takes all of a dimension."""
