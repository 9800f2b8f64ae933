"""Documents are read, or refused in one line, in bounded memory."""

import os
import tracemalloc
from pathlib import Path

import pytest

from megatron_quant import documents
from megatron_quant.documents import (
    CONFIG,
    Limits,
    check_file,
    check_regular,
    parse_json,
    parse_yaml,
    printable,
    read_bytes,
    read_json,
    shown,
)
from megatron_quant.errors import CheckpointError, RecipeError

SMALL = Limits(1000, 100, 8)


def refusal(read, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(*args)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_json_is_read_as_the_configs_of_transformers_have_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(
        b'\xef\xbb\xbf{"a": [1, Infinity, NaN, 1e400, null], "\\u00e4": "\\ud83d\\ude00"}'
    )
    found = read_json(path)
    assert found["a"][1] == found["a"][3] == float("inf") and found["a"][2] != found["a"][2]
    assert found["ä"] == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        (b"\xff\xfe\x00", "codec"),
        ('{"a": "\\ud800"}', "codec"),
        ('{"\\udfff": 1}', "codec"),
        ("[" * 9 + "]" * 9, "nested deeper than 8"),
        ("[" * 40 + "]" * 40, "nested deeper than 8"),
        ("[" * 90, "nested|cannot be read"),
        (f"[{'1,' * 100}1]", "101 values, more than 100"),
        (f'"{"x" * 2000}"', "more than"),
        ("9" * 900, ""),
    ],
)
def test_json_beyond_its_limits_is_refused(content: bytes | str, says: str) -> None:
    if not says:
        assert parse_json(content, "it", SMALL) == int(content)
        return
    message = refusal(parse_json, content, "it", SMALL)
    assert message.startswith("it ") and any(part in message for part in says.split("|"))


def test_json_of_any_depth_is_refused_and_not_a_recursion_error() -> None:
    assert "nested deeper than 64" in refusal(parse_json, "[" * 10**6 + "]" * 10**6, "it")
    assert "nested deeper than 64" in refusal(parse_json, '{"a":' * 10**5 + "1" + "}" * 10**5, "it")
    assert "digits" in refusal(parse_json, "9" * 5000, "it")


def test_a_document_of_many_values_is_refused_before_it_is_parsed() -> None:
    text = f"[{'[],' * 3_000_000}1]"
    tracemalloc.start()
    try:
        assert "more than" in refusal(parse_json, text, "it", CONFIG)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b" " * 1001)
    for read in (read_bytes, check_file):
        for name in ("fifo", "link", "."):
            assert "is no regular file" in refusal(read, tmp_path / name, SMALL)
        assert "has 1001 bytes, more than the 1000" in refusal(read, tmp_path / "large", SMALL)
        assert "cannot be read" in refusal(read, tmp_path / "a\0b", SMALL)
        assert "cannot be read" in refusal(read, tmp_path / "a\ud800b", SMALL)
    assert "does not exist" in refusal(read_bytes, tmp_path / "none", SMALL)
    check_regular(tmp_path / "large")


def test_a_file_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    """Files of /proc have a size of 0, whatever they hold."""
    with pytest.raises(CheckpointError, match="has 5 bytes, more than the 4"):
        read_bytes(Path("/proc/self/status"), Limits(4, 1))


def test_yaml_is_read_with_its_aliases(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: &x {b: [1, two]}\nc: *x\nd: {<<: *x, e: 0x10}\n")
    inner = {"b": [1, "two"]}
    content = read_bytes(path, documents.RECIPE, RecipeError)
    found = parse_yaml(content, "it", RecipeError)
    assert found == {
        "a": inner,
        "c": inner,
        "d": {**inner, "e": 16},
    }
    assert parse_yaml("", "it", RecipeError) is None


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (bomb(), "more than 100000 values"),
        (bomb().replace("[", "{<<: [").replace("]", "]}"), "not valid YAML"),
        ("&a [*a]", "an alias is inside of what it stands for"),
        ("&a {b: {c: *a}}", "an alias is inside of what it stands for"),
        ("[" * 100 + "]" * 100, "nested deeper than 64"),
        ("[" * 10**5, "nested deeper than 64"),
        ("a: 1:" + "59:" * 2000 + "1", "a number of"),
        ("a: 0x" + "f" * 2000, "a number of"),
        ("a: 2001-99-99", "not valid YAML"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: !!timestamp x", "not valid YAML"),
        ("{[]: 1}", "unhashable"),
        ("a: *b", "undefined alias"),
        ("a: 1\n--- \nb: 2", "expected a single document"),
        ("a: [", "patterns need quotes"),
        (b"\xff\xfe\x00\xd8\x00", "codec"),
        ('a: "\\ud800"', "codec"),
    ],
)
def test_yaml_beyond_its_limits_is_refused(content: bytes | str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(content, "it", RecipeError)
    message = str(caught.value)
    assert any(part in message for part in says.split("|")), message
    assert "\n" not in message


def test_values_in_messages_are_short() -> None:
    assert shown("a\x1b[2J\n") == "'a\\x1b[2J\\n'"
    assert len(shown("x" * 10**6)) < 150
    assert shown(1 << 10**6) == "'a number of 1000001 bits'"
    deep: list[object] = []
    for _ in range(10**5):
        deep = [deep] * 20
    assert len(shown(deep)) < 150
    assert shown({"a": [1, None, True]}) == "{'a': [1, None, True]}"


def test_what_moves_the_cursor_is_escaped_for_the_screen() -> None:
    assert printable("model.layers.0 é\N{GRINNING FACE}") == "model.layers.0 é\N{GRINNING FACE}"
    assert printable("a\x1b]0;x\x07\r\n\t\u202eb\x9b\ud800") == (
        "a\\x1b]0;x\\x07\\r\\n\\t\\u202eb\\x9b\\ud800"
    )


def test_every_limit_holds_its_own_largest_published_document() -> None:
    """Kimi-K2's index has 207,000 tensors in 27 MB; its header's share is 3 lists for each."""
    assert documents.INDEX.nbytes > 30e6 and documents.INDEX.values > 500_000
    assert documents.HEADER.nbytes == 100_000_000
