"""Load the tokenizer of a checkpoint, which may be code."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import HF_MODULES_CACHE

from megatron_quant.documents import MB, Limits, check_file, read_json
from megatron_quant.errors import CheckpointError

_PARSED = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_INDEX = ".index.json"
_LARGEST = Limits(128 * MB, 0)
_MODEL = "config.json"
_SETTINGS = "tokenizer_config.json"


@dataclass(frozen=True)
class TokenizerChoice:
    """The choice of a tokenizer.

    Attributes:
        folder: Folder that has it; None for the checkpoint's own.
        trust_remote_code: Whether to run the Python code that it may bring along.
    """

    folder: str | Path | None = None
    trust_remote_code: bool = False

    def load(self, checkpoint: Path) -> PreTrainedTokenizerBase:
        """Load it by :func:`load_tokenizer`. Raises CheckpointError too if the folder is none."""
        folder = checkpoint if self.folder is None else Path(self.folder).expanduser()
        if self.folder is not None and not folder.is_dir():
            raise CheckpointError(
                f"--tokenizer {folder} is no directory: give the folder that has the tokenizer's "
                "files"
            )
        return load_tokenizer(folder, self.trust_remote_code)


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load transformers' tokenizer of a checkpoint from local files only.

    The code of model and config that config.json names is never run.

    Args:
        directory: Folder of the tokenizer's files.
        trust_remote_code: Whether to run the Python code that tokenizer_config.json may name.

    Raises:
        CheckpointError: If transformers cannot read a tokenizer or reads an empty one; if its code
            is missing or not trusted; and if one of its files is not a regular one, or larger than
            any tokenizer's.
    """
    for path in directory.glob("*"):
        if path.suffix in _PARSED and not path.name.endswith(_INDEX) and not path.is_dir():
            check_file(path, _LARGEST)
    code = _code(directory)
    if code is not None and trust_remote_code:
        return _of_code(directory, code)
    refused = CheckpointError(
        f"{directory}: no tokenizer that transformers can read; put the original model's there, or "
        "name its folder with --tokenizer"
        if code is None
        else f"{directory}: the tokenizer is Python code ({code}), which is not run unless asked "
        "for: read it and give --trust-remote-code, or name another tokenizer with --tokenizer"
    )
    try:
        return _working(
            AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        )
    except Exception as e:  # for a broken file, transformers raises whatever its parser does
        raise refused from e


def _working(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Refuse an empty vocabulary: transformers may return one if files are missing."""
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError("its vocabulary is empty")
    return tokenizer


def _code(directory: Path) -> str | None:
    """Return the tokenizer's class as ``module.Class``; None if it is transformers' own."""
    path = directory / _SETTINGS
    found = read_json(path) if path.exists() else None
    found = found.get("auto_map") if isinstance(found, dict) else None
    classes = found.get("AutoTokenizer") if isinstance(found, dict) else found
    named = classes if isinstance(classes, list) else [classes]
    return next((name for name in reversed(named) if isinstance(name, str)), None)


def _of_code(directory: Path, code: str) -> PreTrainedTokenizerBase:
    file = directory / f"{code.partition('.')[0]}.py"
    if "--" in code:
        raise CheckpointError(
            f"{directory}: the tokenizer's code is in another repository ({code}): name a folder "
            "that has tokenizer and code with --tokenizer"
        )
    if not file.is_file():
        raise CheckpointError(
            f"{directory}: {file.name}, the tokenizer's code, is missing: name a folder "
            "that has it with --tokenizer"
        )
    try:
        with _alone(), _nameless(directory) as view:
            return _working(
                AutoTokenizer.from_pretrained(view, trust_remote_code=True, local_files_only=True)
            )
    except Exception as e:  # the code may raise anything
        reason = " ".join(str(e).split()) or type(e).__name__
        raise CheckpointError(
            f"{directory}: the tokenizer's code ({code}) fails ({type(e).__name__}: {reason}): "
            "install what it needs, or name another tokenizer with --tokenizer"
        ) from e


@contextmanager
def _nameless(directory: Path) -> Iterator[Path]:
    """Link the files of ``directory`` beside a config.json that names no code.

    transformers asks config.json for the model's type, and would run its code if allowed.
    """
    with TemporaryDirectory() as made:
        view = Path(made) / directory.resolve().name
        view.mkdir()
        for path in directory.iterdir():
            if path.name != _MODEL:
                (view / path.name).symlink_to(path.resolve())
        if (directory / _MODEL).exists():
            config = read_json(directory / _MODEL)
            if isinstance(config, dict):
                config.pop("auto_map", None)
            (view / _MODEL).write_text(json.dumps(config))
        yield view


@contextmanager
def _alone() -> Iterator[None]:
    """Let one process in at a time: others would read code that is still being copied."""
    folder = Path(HF_MODULES_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".megatron_quant.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
