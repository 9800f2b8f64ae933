"""Match the patterns of names in a checkpoint's config: somebody else's, so within a time limit.

Regular expressions are Python's, as are the tools that write them. A simple one is matched with
``re``. Some of the others take a time that grows exponentially with a name. They are matched with
``regex``, which can be stopped (and which transformers needs anyway). RE2 has no lookahead, which
such configs use.
"""

import re
import time
import warnings
from collections.abc import Callable
from fnmatch import translate

import regex

from megatron_quant.documents import shown
from megatron_quant.errors import CheckpointError

_LONGEST = 10_000  # characters of an expression
_REPEATS = 10_000  # product of all repeat counts: ``regex`` writes repeats out
_SECONDS = 20.0  # of processor time for all names of one config
_NAME = 256  # characters of a name that a simple expression is matched with by ``re``
_FEW, _BRANCHES = 3, 64  # choices of a simple expression, and alternatives in all of them
_BETWEEN = 16  # simple matches from one look at the clock to the next
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_CHOICES = re.compile(r"[*+?{(]")
_REPEATED = re.compile(r"\)[*+{]")
_TIMES = re.compile(r"\{([0-9]*),?([0-9]*)\}")


class Effort:
    """The processor time that is left for the names of one config."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._end = time.thread_time() + seconds
        self._seconds, self._steps = seconds, 0

    def left(self) -> float:
        """Return the seconds that are left; raise CheckpointError where there are none."""
        left = self._end - time.thread_time()
        if left <= 0:
            raise self.spent()
        return left

    def step(self) -> None:
        """Raise CheckpointError where no time is left; look at the clock now and then."""
        self._steps += 1
        if self._steps % _BETWEEN == 0:
            self.left()

    def spent(self, pattern: str | None = None) -> CheckpointError:
        """Return the error for a config that takes too long."""
        what = "its names" if pattern is None else shown(pattern)
        return CheckpointError(
            f"quantization_config: matching {what} takes longer than {self._seconds:g} s; name "
            "the modules, or simplify the expression"
        )


class Expression:
    """One regular expression; CheckpointError where it is none, or takes too long."""

    def __init__(self, pattern: str, effort: Effort) -> None:
        self._pattern, self._effort = pattern, effort
        _check_size(pattern)
        bare = _ESCAPED.sub("", pattern)
        _check_repeats(pattern, bare)
        self._choices = len(_CHOICES.findall(bare))
        self._simple = not _REPEATED.search(bare) and bare.count("|") <= _BRANCHES
        self._python = _compiled(re.compile, pattern)
        self._regex: regex.Pattern[str] | None = None

    def match(self, name: str) -> bool:
        """Return whether the expression matches at the start of ``name``."""
        if self._is_quick(name, self._choices):
            return self._python.match(name) is not None
        return self._limited(self._stoppable().match, name)

    def search(self, name: str) -> bool:
        """Return whether the expression matches anywhere in ``name``."""
        if self._is_quick(name, self._choices + 1):
            return self._python.search(name) is not None
        return self._limited(self._stoppable().search, name)

    def _is_quick(self, name: str, choices: int) -> bool:
        """Return whether the time is at most a small power of the name's length.

        It is where there are few choices to go back to. Each quantifier and each group counts as
        one, and so does anything that only looks like one. A group that repeats would count as many
        times as the name has characters.
        """
        self._effort.step()
        return self._simple and choices <= _FEW and len(name) <= _NAME

    def _stoppable(self) -> regex.Pattern[str]:
        if self._regex is None:
            self._regex = _compiled(regex.compile, self._pattern)
        return self._regex

    def _limited(self, find: Callable[..., object], name: str) -> bool:
        if len(name) > _LONGEST:  # memory grows with it too
            raise self._effort.spent(self._pattern)
        try:
            return find(name, timeout=self._effort.left()) is not None
        except TimeoutError:
            raise self._effort.spent(self._pattern) from None


class Wildcard:
    """A name with the ``*``, ``?`` and sets of ``fnmatch``: matching it never goes back."""

    def __init__(self, pattern: str, effort: Effort) -> None:
        _check_size(pattern)
        self._python, self._effort = _compiled(re.compile, translate(pattern)), effort

    def match(self, name: str) -> bool:
        """Return whether all of ``name`` matches."""
        self._effort.step()
        return self._python.match(name) is not None


def _check_size(pattern: str) -> None:
    if len(pattern) > _LONGEST:
        raise CheckpointError(
            f"quantization_config: {shown(pattern)} has {len(pattern)} characters, more than "
            f"the {_LONGEST} of an expression that is read"
        )


def _check_repeats(pattern: str, bare: str) -> None:
    times = 1
    for counts in _TIMES.findall(bare):
        times *= max((int(count) for count in counts if count), default=1) or 1
        if times > _REPEATS:
            raise CheckpointError(
                f"quantization_config: {shown(pattern)} repeats more than {_REPEATS} times; name "
                "the modules, or simplify the expression"
            )


def _compiled(compile_: Callable[[str], re.Pattern[str]], pattern: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():  # it warns of sets that another Python may read otherwise
            warnings.simplefilter("ignore")
            return compile_(pattern)
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"quantization_config: {shown(pattern)} is no regular expression: {reason}"
        ) from None
