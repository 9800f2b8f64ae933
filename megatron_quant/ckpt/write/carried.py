"""Choose the files beside a checkpoint's weights that an export takes along.

It takes all but those that it writes itself: weights, their index, config.json, and the files that
say how the source is quantized. Code is copied like any other file, and never run.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_quant.ckpt.dialects import FILES
from megatron_quant.ckpt.plan import CONFIG
from megatron_quant.ckpt.storage import MANIFEST
from megatron_quant.errors import CheckpointError
from megatron_quant.folding import DOCUMENT

_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml"),
    *("*.onnx", "*.onnx_data", "*.npz", "*.npy", "*.pkl", "*.pickle", "*.nemo", "*.distcp", "*.ot"),
    *("*.tflite", "*.engine", "*.pdparams"),
)
_OWN = (MANIFEST, DOCUMENT, *FILES, "quantization_config.json", "*.index.json")
_LARGEST = 256 << 20
"""Most bytes of a file beside the weights: tokenizers have some tens of millions."""


@dataclass(frozen=True)
class Beside:
    """The files beside the weights.

    carried: files to take along, below the source's directory, sorted by name. left_out: the
    others and why they stay, one line each.
    """

    carried: tuple[Path, ...]
    left_out: tuple[str, ...]


def beside(directory: Path) -> Beside:
    """Find the files beside the weights in the checkpoint ``directory``, in folders too.

    Hidden files stay behind, and so do folders with weights of their own and links to somewhere
    else. The hub's cache is the exception: all its files are links. Raises CheckpointError if the
    directory cannot be listed.
    """
    carried: list[Path] = []
    left_out: list[str] = []
    for path in _entries(directory):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            files = [] if path.is_symlink() else list(_files(path))
            reason = _of_folder(path, files)
        else:
            files, reason = [path], ""
        if reason:
            left_out.append(f"{path.name}/: {reason}")
            continue
        for file in files:
            name = file.relative_to(directory).as_posix()
            reason = _reason(directory, file)
            if reason:
                left_out.append(f"{name}: {reason}")
            elif name != CONFIG and not _matches(file.name, (*_WEIGHTS, *_OWN)):
                carried.append(file)
    return Beside(tuple(carried), tuple(left_out))


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be read: {error.strerror}; make it readable, or fetch it again"
        ) from error


def _files(folder: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        yield from (Path(at, name) for name in sorted(names) if not name.startswith("."))


def _of_folder(folder: Path, files: list[Path]) -> str:
    if folder.is_symlink():
        return "a link to another folder"
    weights = next((f for f in files if _matches(f.name, _WEIGHTS)), None)
    return f"a folder with weights of its own ({weights.name})" if weights else ""


def _reason(directory: Path, file: Path) -> str:
    """Return why a file stays behind; empty if it does not."""
    if _matches(file.name, _WEIGHTS):
        return ""
    if file.is_symlink() and not _is_own(directory, file):
        return "a link to somewhere outside the checkpoint"
    if not file.is_file():
        return "no regular file"
    return f"larger than {_LARGEST >> 20} MiB" if file.stat().st_size > _LARGEST else ""


def _is_own(directory: Path, link: Path) -> bool:
    target, root = link.resolve(), directory.resolve()
    cache = root.parent.parent / "blobs"  # the hub's cache has snapshots/REVISION beside blobs
    return target.is_relative_to(root) or (
        root.parent.name == "snapshots" and target.is_relative_to(cache)
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
