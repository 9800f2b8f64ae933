"""No page shows a command, a flag or a target that does not exist.

tests/dist/test_page_commands.py runs what can be run on tiny models.
"""

import argparse
import ast
import re
from pathlib import Path

import pytest
import yaml

from megatron_quant.cli.main import parser
from megatron_quant.recipes import parse_recipe
from tests.unit import pages

MAKE = set(re.findall(r"^([a-z][\w-]*):", (pages.ROOT / "Makefile").read_text(), re.MULTILINE))
MEGATRON_LM = {
    *("--ckpt-convert-format", "--ckpt-convert-save", "--ckpt-format", "--save", "--load"),
    "--finetune",
    *("--num-layers", "--hidden-size", "--num-attention-heads", "--num-query-groups"),
    *("--kv-channels", "--ffn-hidden-size", "--num-experts", "--moe-router-topk"),
    *("--moe-ffn-hidden-size", "--norm-epsilon", "--rotary-base", "--max-position-embeddings"),
    *("--untie-embeddings-and-output-weights", "--qk-layernorm"),
}
ALSO = {"--write", *MEGATRON_LM}
"""Flags of the script that makes tables, and of Megatron-LM."""
COMMANDS = [(page, command) for page in pages.PAGES for command in pages.commands(page)]
OURS = ("megatron-quant", "megatron_quant", "examples/quantize.py")


def verb_of(command: list[str]) -> list[str] | None:
    """The words that the command line's parser gets; None for another program's."""
    for at, word in enumerate(command):
        if word in OURS:
            verb = ["quantize"] if word == "examples/quantize.py" else []
            return verb + command[at + 1 :]
    return None


def train_qat() -> argparse.ArgumentParser:
    """The parser of examples/train_qat.py, which itself imports Megatron."""
    tree = ast.parse((pages.ROOT / "examples" / "train_qat.py").read_text())
    (parse,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "parse"]
    assert ast.unparse(parse.body[-1]) == "return parser.parse_args()"
    names = {"argparse": argparse, "Path": Path, "__doc__": ""}
    parse.body[-1] = ast.Return(ast.Name("parser", ast.Load()))
    module = ast.fix_missing_locations(ast.Module([parse], []))
    exec(compile(module, "train_qat.py", "exec"), names)
    return names["parse"]()


def test_our_commands_parse() -> None:
    ours = [(page, words) for page, command in COMMANDS if (words := verb_of(command)) is not None]
    for page, words in ours:
        try:
            parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{pages.name_of(page)}: {words}")
    assert len(ours) >= 10


def test_the_training_script_s_commands_parse() -> None:
    script = "examples/train_qat.py"
    shown = [command[command.index(script) + 1 :] for _, command in COMMANDS if script in command]
    for words in shown:
        train_qat().parse_args(words)
    assert shown


def test_other_commands_name_what_exists() -> None:
    missing = []
    for page, command in COMMANDS:
        if command[0] == "make" and command[1] not in MAKE:
            missing.append((page.name, command))
        if "-m" in command and command[command.index("-m") + 1].startswith("benchmarks."):
            module = command[command.index("-m") + 1].replace(".", "/")
            if not (pages.ROOT / f"{module}.py").exists():
                missing.append((page.name, command))
    assert missing == []


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_flags_and_targets_in_the_text_exist(page: Path) -> None:
    known = options(parser()) | options(train_qat()) | ALSO
    flags = {f for word in pages.words(page) for f in re.findall(r"(?<![\w-])--[a-z][\w-]*", word)}
    targets = {word.split()[1] for word in pages.words(page) if re.match(r"make [a-z]", word)}
    assert flags - known == set() and targets - MAKE == set()


def options(of: argparse.ArgumentParser) -> set[str]:
    """Flags of a parser and of its verbs."""
    found = {flag for action in of._actions for flag in action.option_strings}
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {flag for verb in action.choices.values() for flag in options(verb)}
    return found


def test_a_flag_that_does_not_exist_is_seen() -> None:
    assert "--export-dir" in options(parser()) and "--no-fsync" in options(parser())
    assert "--nothing" not in options(parser())


def test_recipes_that_are_shown_can_be_read() -> None:
    shown = pages.blocks(pages.ROOT / "docs" / "recipes.md", "yaml")
    recipes = [parse_recipe("recipes.md", yaml.safe_load(text)) for text in shown]
    assert [len(recipe.rules) for recipe in recipes] == [3]


def test_the_readme_s_python_is_that_of_the_page_that_is_run() -> None:
    (readme,) = pages.blocks(pages.ROOT / "README.md", "python")
    assert readme in pages.blocks(pages.ROOT / "docs" / "api.md", "python")


def test_every_other_python_snippet_is_on_a_page_that_is_run() -> None:
    """tests/dist/test_api.py and tests/dist/test_training_page.py run these."""
    run = {"README.md", "docs/api.md", "docs/training.md"}
    assert {pages.name_of(p) for p in pages.PAGES if pages.blocks(p, "python")} == run
