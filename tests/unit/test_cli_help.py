"""``--help`` of every verb, and the end of a command line that cannot be parsed."""

import argparse
import re
import subprocess
import sys

import pytest

import megatron_quant as mq
from megatron_quant.cli.main import parser
from megatron_quant.cli.serving import arguments
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.settings import flags_of
from tests.dist.command import command

FLAGS = (
    *("hf-model-id", "export-quant-cfg", "tp", "pp", "ep", "etp", "dtype", "weight-only"),
    *("num-virtual-stages-per-pipeline-rank", "num-layers-in-first-pipeline-stage"),
    *("num-layers-in-last-pipeline-stage",),
    *("expert-scales", "calib-size", "calib-seq-length", "calib-batch-size", "calib-dataset"),
    *("cold-experts", "export-dir", "export-format", "max-shard-size", "overwrite", "dry-run"),
    *("io-threads", "fsync", "verify", "resume"),
    *("eval-text", "report", "log-to", "tokenizer", "trust-remote-code"),
)
RECIPES = ("fp8", "nvfp4_mlp_only", "w4a16_nvfp4", "int4", "a YAML path", "ModelOpt preset")


def test_the_top_names_the_verbs() -> None:
    ended = command("--help")
    assert ended.status == 0
    verbs = ("quantize", "export", "verify", "eval", "search", "sensitivity")
    assert [len(re.findall(rf"^ *{verb}\s+[a-z]", ended.out, re.M)) for verb in verbs] == [1] * 6
    assert command("--version").out == f"megatron-quant {mq.__version__}\n"


def test_quantize_names_every_flag_and_recipe_and_gives_examples() -> None:
    ended = command("quantize", "--help")
    assert ended.status == 0
    assert [flag for flag in FLAGS if not re.search(rf"^  --{flag}\b", ended.out, re.M)] == []
    words = " ".join(ended.out.split())
    assert [recipe for recipe in RECIPES if recipe not in words] == []
    examples = ended.out.partition("examples:")[2]
    assert "torchrun --nproc-per-node 4 examples/quantize.py --hf-model-id" in examples
    assert "--dry-run" in examples


@pytest.mark.parametrize("verb", ["verify", "eval", "export"])
def test_other_verbs_say_what_they_do(verb: str) -> None:
    ended = command(verb, "--help")
    assert ended.status == 0
    assert "DIR" in ended.out and len(ended.out.splitlines()) > 8


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the following arguments are required: VERB"),
        (["quantise"], "invalid choice: 'quantise'"),
        (["quantize", "--tp", "two"], "argument --tp: invalid int value: 'two'"),
        (["verify"], "are required: DIR"),
        (["eval", "x"], "are required: --text"),
    ],
)
def test_a_command_line_that_cannot_be_parsed(argv: list[str], words: str) -> None:
    ended = command(*argv)
    assert ended.status == 2
    assert words in ended.err.splitlines()[-1]


def test_every_flag_that_says_what_is_done_reaches_the_front_door() -> None:
    """A flag that is parsed and then dropped would be ignored without a word."""
    argv = ["quantize", "--hf-model-id", "M", "--export-quant-cfg", "fp8", "--export-dir", "D"]
    args = vars(parser().parse_args(argv))
    options = flags_of(QuantizeOptions.from_flags(**args))
    assert args.keys() - options.keys() == {"verb", "run", "traceback", "verbose", "dry_run"}
    given = arguments(argparse.Namespace(**args))
    groups = {"parallel", "calibration", "serve", "write"}
    fields = set(QuantizeOptions.__dataclass_fields__)
    assert given.keys() - {"format"} - groups == fields - groups - {
        *("hf_model_id", "export_quant_cfg", "export_dir", "export_format")
    }


def test_the_module_is_the_command() -> None:
    argv = [sys.executable, "-m", "megatron_quant", "verify", "/no/such"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    line = "megatron-quant: error: /no/such: no such directory; give an exported checkpoint\n"
    assert done.stderr == line


@pytest.mark.parametrize("argv", [["quantize"], ["export", "DIR"]])
def test_both_verbs_write_modelopt_unless_told_otherwise(argv: list[str]) -> None:
    assert parser().parse_args([*argv, "--export-dir", "OUT"]).export_format == "modelopt"
