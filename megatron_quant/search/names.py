"""The names that a search's flags may have. Nothing here imports torch."""

KV_CACHE = "KV cache"
"""Name of the place that is no weight."""
NONE = "none"
"""Candidate that leaves a place unquantized. It is always there."""
COSTS = ("weight", "active")
"""``weight``: bits stored for a weight, scales included. ``active``: bits read for a weight that a
token meets, so experts count by the share of them that a token is sent to."""
METHODS = ("gradient", "kl_div")
"""``gradient``: one forward and backward a batch; the score of an option is the sum of (gradient of
the place's output x change of that output)^2. ``kl_div``: a forward a batch for every option; its
score is the KL divergence of the logits from the unquantized model's."""
