"""Which slots a rule's patterns match."""

import re
from collections.abc import Sequence
from fnmatch import translate

from megatron_quant.recipes.plan import Slot


class Matcher:
    """The patterns of one rule, compiled: a plan tries each on tens of thousands of experts."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._regex = re.compile("|".join(translate(p) for p in patterns))

    def members(self, slot: Slot) -> tuple[str, ...]:
        """The fused members that a pattern matches: all, where one matches Megatron's name."""
        if self._regex.match(slot.module):
            return slot.sources
        return tuple(s for s in slot.sources if self._regex.match(s))

    def touches(self, slot: Slot) -> bool:
        """Whether a pattern matches any name of the slot."""
        return bool(self.members(slot))
