"""Patterns of names in a checkpoint's config: they match as their tools do, in bounded time."""

import re
from typing import Any

import pytest

from megatron_quant.ckpt.dialects import expressions
from megatron_quant.ckpt.dialects.expressions import Effort, Expression, Wildcard
from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.errors import CheckpointError
from tests.unit import exported

BOMB = r"model.(?:a|a)*(?:a|a)*$"  # its time grows exponentially with a name
NAME = "model.layers.0.mlp.experts.31.down_proj"


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Effort.__init__, "__defaults__", (0.2,))


@pytest.mark.parametrize(
    ("pattern", "match", "search"),
    [
        (r".*\.mlp\.", True, True),
        (r"mlp", False, True),
        (r"model\.layers\.(\d|[1-3]\d)\.(mlp|self_attn)\..*(up|down)_proj$", True, True),
        (r"(?!.*gate)(?=.*down)(model)\.(layers)\.(\d+)\.(mlp)", True, True),
        (r"layers\.(\d+)\.(mlp)(\.experts)\.(\d+)$", False, False),
        (r"(?P<a>model)\.(layers)\.(0)\.(mlp)\.(?:experts)", True, True),
        (r"MODEL", False, False),
    ],
)
def test_they_mean_what_they_mean_in_python(pattern: str, match: bool, search: bool) -> None:
    for _ in ("the first time", "from then on"):
        found = Expression(pattern, Effort())
        assert (found.match(NAME), found.search(NAME)) == (match, search)
    short = Expression(pattern, Effort())
    assert not short.match("") and not short.search("")


def test_wildcards_are_those_of_file_names() -> None:
    for pattern, means in [("*experts*", True), ("*.3?.*", True), ("mlp*", False), ("*[!0]", True)]:
        assert Wildcard(pattern, Effort()).match(NAME) is means
    assert not Wildcard("*a" * 100 + "*b", Effort()).match("a" * 5000)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "'\\(' is no regular expression: missing \\)"),
        ("(" * 5000 + ")" * 5000, "is no regular expression"),
        ("x" * 10_001, "has 10001 characters, more than the 10000"),
        ("(?:a{100}){101}", "repeats more than 10000 times"),
        ("(?:(?:a{1000}){1000}){1000}", "repeats more than 10000 times"),
        ("a{99999999999999999999}", "repeats more than 10000 times"),
        ("(?R)", "is no regular expression"),
        ("(?i)(?s)" + "(a)" * 3000 + "(?P<a>x)(?P<a>y)", "is no regular expression"),
    ],
)
def test_what_is_none_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        Expression(pattern, Effort())
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("find", ["match", "search"])
def test_an_expression_that_takes_too_long_is_stopped(find: str) -> None:
    for bomb in ("(a|a)*$", "(?:a|a)+$", "(?x)(a|a) +$", "((a|aa)+)+x$", "(?:a|aa){1,99}?$"):
        said = rf"matching '{re.escape(bomb)}' takes longer than 0\.2 s; name the modules"
        with pytest.raises(CheckpointError, match=said):
            getattr(Expression(bomb, Effort()), find)("a" * 200 + "!")
    with pytest.raises(CheckpointError, match="takes longer"):
        getattr(Expression("(a)(b)?(c)?x", Effort()), find)("a" * 10_001)


def test_what_grows_exponentially_in_python_is_never_matched_with_it() -> None:
    for bomb in ("(a+)+$", "(a*)*$", "(a|a)*$", "(?:a|a){9}", "(|a|a|a)(|a|a)(|a|a)x" + "|b" * 60):
        found = Expression(bomb, Effort())
        assert not found._is_quick("a" * 200, 1)
    assert Expression("(a|b)?c$", Effort())._is_quick("a" * 200, 3)
    assert not Expression("(a|b)?c$", Effort())._is_quick("a" * 300, 3)


def test_the_time_is_that_of_all_names_together() -> None:
    effort = Effort(0.05)
    quick = Expression("a*b", effort)
    with pytest.raises(CheckpointError, match=r"its names takes longer than 0\.05 s"):
        while True:
            quick.match("a" * 200)


QUANT: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128, "dynamic": {f"-:{BOMB}": {}}},
    "auto-round": {"bits": 4, "group_size": 128, "extra_config": {BOMB: {"bits": 8}}},
    "fp8": {"weight_block_size": [128, 128], "modules_to_not_convert": [BOMB]},
    "compressed-tensors": {"ignore": [f"re:{BOMB}"]},
}


@pytest.mark.parametrize("name", QUANT)
def test_no_dialect_is_held_by_one(name: str) -> None:
    modules = (f"model.{'a' * 200}!", "model.b")
    with pytest.raises(CheckpointError, match=r"matching '.*model\..*' takes longer than 0\.2 s"):
        get_dialect(name).read_config(QUANT[name], modules)


def test_no_dialect_is_held_by_many_names() -> None:
    many = ["b" * 40] * 30_000
    modules = tuple(f"model.{'a' * 400}.{i}" for i in range(3000))
    awq = {"bits": 4, "group_size": 128, "modules_to_not_convert": many}
    with pytest.raises(CheckpointError, match="matching its names takes longer"):
        get_dialect("awq").read_config(awq, modules)


def test_what_is_written_is_matched_as_quickly_as_before() -> None:
    """What this library writes never needs the engine that can be stopped."""
    for name in ("gptq", "compressed-tensors"):
        config = get_dialect(name).quantization_config(
            exported.plan("int4", keep=lambda module: "self_attn" in module)
        )
        listed = [k[2:] for k in config.get("dynamic", {})]
        listed += [t[3:] for g in config.get("config_groups", {}).values() for t in g["targets"]]
        for pattern in listed:
            quick = Expression(pattern, Effort())
            quick.match(NAME)
            assert quick._regex is None
    assert expressions._FEW == 3
