"""Match the patterns of a rule against slots."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase, translate

from megatron_quant.recipes.plan import Slot


class Matcher:
    """The compiled patterns of one rule: a plan tries each on tens of thousands of experts."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = tuple(patterns)
        self._regex = re.compile("|".join(translate(p) for p in patterns))

    def members(self, slot: Slot) -> tuple[str, ...]:
        """Return the fused members that a pattern matches: all for a match of Megatron's name."""
        if self._regex.match(slot.module):
            return slot.sources
        return tuple(s for s in slot.sources if self._regex.match(s))

    def names(self, slot: Slot) -> bool:
        """Return whether a pattern matches the slot's only member by its own last name.

        A wildcard may stand for what is before it alone.
        """
        (source,) = slot.sources
        leaf = source.rpartition(".")[2]
        return any(p.rpartition(".")[2] == leaf and fnmatchcase(source, p) for p in self._patterns)

    def touches(self, slot: Slot) -> bool:
        """Return whether a pattern matches any name of the slot."""
        return bool(self.members(slot))
