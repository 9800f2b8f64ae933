"""Sizes that stand for something else, as formats and the C loops both read them."""

WHOLE = 0
"""As a block's size along a dimension: all of it."""
