"""Find a Hugging Face checkpoint: its directory, its config, the files beside its weights."""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from megatron_quant import documents
from megatron_quant.documents import CONFIG, Limits
from megatron_quant.errors import CheckpointError

_WANTED = (
    *("*.json", "*.jinja", "*.model", "*.model.v[0-9]*", "*.tiktoken"),
    *("vocab.txt", "merges.txt", "*.bpe", "LICENSE*", "NOTICE*", "README.md"),
)
"""Files that are fetched, of the repository's root alone."""
_CODE, _WEIGHTS = "*.py", "*.safetensors"
_UNWANTED = ("*/*", "consolidated*")
"""Files that are never fetched: those in folders, copies of the weights for other tools."""
_FOLDERS = ("additional_chat_templates/*.jinja", "[0-9]_*/config.json")
"""Files in folders that are fetched: chat templates, and modules of embedding models."""


def resolve_source(path_or_hub_id: str, code: bool = False, weights: bool = True) -> Path:
    """Return the local directory of a checkpoint, downloaded where it is a hub id (``owner/name``).

    Only safetensors, JSON, tokenizer files and licences of a repository's root are fetched, and
    chat templates; never pickles. code: fetch the root's Python files too, for a tokenizer that
    is code. weights: fetch the safetensors.

    Raises:
        CheckpointError: Where there is neither a directory nor a repository.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path_or_hub_id} is a file; give the checkpoint's directory")
    if path.is_absolute() or path_or_hub_id.startswith((".", "~")) or len(path.parts) != 2:
        raise CheckpointError(
            f"{path_or_hub_id} does not exist; give a checkpoint directory or a hub id (owner/name)"
        )
    return _download(path_or_hub_id, code, weights)


def _download(hub_id: str, code: bool, weights: bool) -> Path:
    wanted, unwanted = [*_WANTED], [*_UNWANTED]
    (wanted if code else unwanted).append(_CODE)
    (wanted if weights else unwanted).append(_WEIGHTS)
    try:
        found = huggingface_hub.snapshot_download(
            hub_id, allow_patterns=wanted, ignore_patterns=unwanted
        )
        # A pattern's * goes through folders, so these need a call of their own.
        huggingface_hub.snapshot_download(
            hub_id, revision=Path(found).name, allow_patterns=list(_FOLDERS)
        )
    except (HfHubHTTPError, OSError, ValueError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise CheckpointError(
            f"{hub_id} is no local directory and cannot be fetched from the hub ({reason}); "
            "give a checkpoint directory or another hub id"
        ) from e
    return Path(found)


def read_object(path: Path, limits: Limits = CONFIG) -> dict[str, Any]:
    """Return the object in the JSON file ``path``; CheckpointError where it holds none."""
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a checkpoint directory as save_pretrained writes it"
        )
    try:
        content = documents.read_json(path, limits)
    except CheckpointError as e:
        raise CheckpointError(f"{e}; fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds no JSON object but {type(content).__name__}; fetch it again"
        )
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint directory; CheckpointError where there is none."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist; give a checkpoint directory")
    return read_object(directory / "config.json")
