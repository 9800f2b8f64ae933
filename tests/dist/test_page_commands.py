"""Commands of ours on all pages, run as they stand there on tiny models, page by page in order."""

import json
import shutil
from pathlib import Path

import pytest

from tests.dist import checkpoints, packed
from tests.dist.command import Ended, command
from tests.dist.pool import Ranks
from tests.unit import pages
from tests.unit.test_deepseek_v4_form import release
from tests.unit.test_docs_commands import COMMANDS, verb_of

ELSEWHERE = {
    "megatron-quant quantize --megatron-load-path THEIRS": "tests/dist/test_megatron_modelopt.py "
    "makes what ModelOpt saves",
    "--megatron-load-path RUN": "tests/dist/test_from_training_page.py does, on a run that megatron-core "
    "saved",
    "--report search.html": "tests/dist/test_report.py draws a search, from scores that it makes",
    "--quantize-mtp": "tests/dist/test_mtp.py quantizes such layers, which the page's model has not",
    "examples/train_qat.py": "tests/dist/test_train_qat.py runs it",
    "make": "each takes minutes, or makes an environment; make test runs this file",
    "benchmarks": "they measure for minutes",
    "pip install": "it needs the network",
    "setup.py build_ext": "the tests run on what it built",
    "docs/upstream/NAME.py": "they show faults of other libraries",
}
"""Part of a command -> why it is not run here."""
HERE = [
    (page, shown) for page, shown in COMMANDS if pages.name_of(page) != "docs/from_training.md"
]
"""All but those of a page that has a test of its own, ``test_from_training_page.py``."""
DRAWN = ("docs/architecture.md Recipe", "docs/architecture.md `---", "docs/training.md quantizers:")
"""Starts of what is a drawing or a line of output."""
OUTPUTS = ("scores", "found.yaml", "found475.yaml", "report.html", "evaluation.html")
"""Outputs that pages do not write in capitals."""
LITTLE_DATA = ("--calib-size", "8", "--calib-seq-length", "32", "--cold-experts", "layer-max")
SHOWN = sorted({pages.name_of(page) for page, shown in HERE if verb_of(shown) is not None})
TEXT = "All work and no play makes Jack a dull boy, said the quantizer to the router. " * 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Word of a command -> what stands for it."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in "abc"))
    (root / "heldout.txt").write_text(TEXT)
    return {
        "PATH": str(checkpoints.save("qwen3_moe", root / "source", num_experts=4)),
        "RELEASE": str(release(root / "release")),
        "GPTQ_CHECKPOINT": str(packed.save(root / "gptq")[0]),
        "corpus.jsonl": str(root / "corpus.jsonl"),
        "heldout.txt": str(root / "heldout.txt"),
    }


def reason(shown: list[str]) -> str | None:
    """Why a command is not run here; None where it is."""
    line = " ".join(shown)
    return next((why for part, why in ELSEWHERE.items() if part in line), None)


def run(ranks: Ranks, shown: list[str], inputs: dict[str, str], folder: Path) -> list[Ended]:
    """Run a command that a page shows, its outputs below ``folder``, whatever is there."""
    words = verb_of(shown)
    assert words is not None
    places = {w: str(folder / w) for w in words if w.isupper() or w in OUTPUTS} | inputs
    argv = [places.get(word, word) for word in words]
    for flag in ("--export-dir", "--megatron-save-path"):
        if flag in argv:
            shutil.rmtree(argv[argv.index(flag) + 1], ignore_errors=True)
    if words[0] in ("quantize", "sensitivity") and "--weight-only" not in words:
        argv += LITTLE_DATA
    if words[0] == "eval":
        argv += ("--seq-length", "32", "--max-tokens", "128")
    count = int(shown[shown.index("--nproc-per-node") + 1]) if shown[0] == "torchrun" else 1
    return ranks(count, command, *argv, timeout=120)


@pytest.mark.parametrize("page", SHOWN)
def test_commands_of_a_page(
    page: str, inputs: dict[str, str], tmp_path: Path, ranks: Ranks
) -> None:
    done = 0
    for on, shown in HERE:
        if pages.name_of(on) != page or verb_of(shown) is None or reason(shown) is not None:
            continue
        ended = run(ranks, shown, inputs, tmp_path)
        assert [e.status for e in ended] == [0] * len(ended), (shown, [e.err for e in ended])
        done += 1
    assert done
    assert [path for path in pages.ROOT.glob("*.html") if path.name in OUTPUTS] == []


def test_every_other_command_has_a_reason() -> None:
    lines = [
        f"{pages.name_of(page)} {' '.join(shown)}"
        for page, shown in HERE
        if verb_of(shown) is None or reason(shown) is not None
    ]
    others = [line for line in lines if reason([line]) is None and not line.startswith(DRAWN)]
    assert others == []
    assert [part for part in ELSEWHERE if not any(part in line for line in lines)] == []
