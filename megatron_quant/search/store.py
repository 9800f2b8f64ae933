"""Keep scores in a directory as they come: JSON for what is scored, safetensors for the scores.

``search.json`` says what the scores are of. ``batch-N.safetensors`` has ``scores``, fp64 [options
of all places], of the N-th batch. A batch that is there is not scored again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from megatron_quant.ckpt.storage import explained, write_file
from megatron_quant.documents import INDEX, read_json
from megatron_quant.errors import CheckpointError
from megatron_quant.fields import Fields
from megatron_quant.recipes import parse_recipe, rule_document
from megatron_quant.search.names import METHODS
from megatron_quant.search.problem import Option, Place, Problem

ABOUT = "search.json"
_FLAG = "--auto-quantize-checkpoint"


@dataclass(frozen=True)
class Scored:
    """A finished search: the places, the scores of their options by place, and the method."""

    problem: Problem
    scores: Mapping[str, Sequence[float]]
    method: str


class ScoreStore:
    """A directory of scores.

    Args:
        directory: Its path.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def begin(self, about: Mapping[str, str], batches: int, problem: Problem) -> None:
        """Make the directory, or check that it holds scores of the same search.

        Args:
            about: What the scores depend on, by readable names.
            batches: Number of batches.
            problem: The places.

        Raises:
            CheckpointError: If it holds scores of another search.
            ExportError: For what the disk refuses.
        """
        document = {"about": dict(about), "batches": batches, **_document(problem)}
        path = self.directory / ABOUT
        if path.exists():
            _check_same(self.directory, read_json(path, INDEX), json.loads(json.dumps(document)))
            return
        with explained(path, "cannot be written", _FLAG):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._write(path, json.dumps(document, indent=1).encode())

    def has(self, batch: int) -> bool:
        """Return whether a batch is scored."""
        return self._file(batch).exists()

    def put(self, batch: int, scores: torch.Tensor) -> None:
        """Keep the scores of a batch, fp64 [options of all places]."""
        self._write(self._file(batch), save({"scores": scores.contiguous()}))

    def get(self, batch: int, options: int) -> torch.Tensor:
        """Return the scores of a batch.

        Raises:
            CheckpointError: For a file that cannot be read or has other scores.
        """
        path = self._file(batch)
        try:
            found = load_file(path).get("scores")
        except (SafetensorError, OSError) as e:
            raise CheckpointError(
                f"{path} cannot be read ({e}): remove it, and search again"
            ) from e
        if found is None or found.dtype != torch.float64 or found.shape != (options,):
            raise CheckpointError(f"{path} has no scores of this search: remove it")
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(f"{path} has scores that are not finite: remove it")
        return found

    def read(self) -> Scored:
        """Return a finished search.

        Raises:
            CheckpointError: If the directory holds none, or batches are missing.
        """
        path = self.directory / ABOUT
        if not path.is_file():
            raise CheckpointError(f"{self.directory} has no {ABOUT}: give the {_FLAG} of a search")
        fields = Fields(_object(read_json(path, INDEX), path), str(path))
        problem, batches = _problem(fields), fields.count("batches")
        missing = [i for i in range(batches) if not self.has(i)]
        if missing:
            raise CheckpointError(
                f"{self.directory} has scores of {batches - len(missing)} of {batches} batches: "
                f"run the search again with {_FLAG} to finish it"
            )
        options = sum(len(p.options) for p in problem.places)
        total = torch.stack([self.get(i, options) for i in range(batches)]).sum(0)
        about = fields.part("about")
        if (method := about.text("method")) not in METHODS:
            raise about.refused("method", f"one of {', '.join(METHODS)}")
        return Scored(problem, by_place(problem, total), method)

    def _file(self, batch: int) -> Path:
        return self.directory / f"batch-{batch}.safetensors"

    def _write(self, path: Path, content: bytes) -> None:
        unfinished = path.with_name(f"{path.name}.incomplete")
        with explained(path, "cannot be written", _FLAG):
            write_file(unfinished, content, fsync=True)
            os.replace(unfinished, path)


def by_place(problem: Problem, flat: torch.Tensor) -> dict[str, list[float]]:
    """Return the scores of each place, from those of all options in order."""
    parts = flat.split([len(p.options) for p in problem.places])
    return {p.name: part.tolist() for p, part in zip(problem.places, parts, strict=True)}


def _check_same(directory: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    found = _object(found, directory / ABOUT)
    about = found.get("about")
    if isinstance(about, dict):
        for name, value in wanted["about"].items():
            if about.get(name) != value:
                raise _other(directory, f"{name} {about.get(name)!r}, not {value!r}")
    for key in wanted:
        if found.get(key) != wanted[key]:
            raise _other(directory, f"other {key}")


def _other(directory: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{_FLAG} {directory} has scores of another search ({what}): choose another directory"
    )


def _object(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no object: choose another {_FLAG}")
    return value


def _document(problem: Problem) -> dict[str, Any]:
    return {
        "candidates": list(problem.candidates),
        "left": list(problem.left),
        "kv_cache": problem.kv_cache,
        "places": [_place_document(place) for place in problem.places],
    }


def _place_document(place: Place) -> dict[str, Any]:
    own = {k: v for k, v in vars(place).items() if k not in ("options", "modules", "cached")}
    own |= {"cached": place.cached} if place.cached else {}
    return own | {"modules": list(place.modules), "options": _options_document(place.options)}


def _options_document(options: Sequence[Option]) -> list[dict[str, Any]]:
    return [
        {
            "candidates": list(o.candidates),
            "nbytes": o.nbytes,
            "rule": rule_document(replace(o.rule, patterns=("*",))),
            **({"kv_cache": o.kv_cache} if o.kv_cache else {}),
        }
        for o in options
    ]


def _problem(fields: Fields) -> Problem:
    places = fields.get("places")
    if not isinstance(places, list) or not places:
        raise fields.refused("places", "a list of places")
    return Problem(
        places=tuple(_place(_fields(place, fields)) for place in places),
        candidates=fields.texts("candidates"),
        left=fields.texts("left"),
        kv_cache=fields.text("kv_cache"),
    )


def _fields(value: Any, of: Fields) -> Fields:
    return Fields(_object(value, Path(of.where)), of.where)


def _place(fields: Fields) -> Place:
    options = fields.get("options")
    if not isinstance(options, list) or not options:
        raise fields.refused("options", "a list of options")
    cached = fields.count("cached", most=1 << 62) if fields.get("cached") is not None else 0
    return Place(
        name=fields.text("name"),
        family=fields.text("family"),
        modules=fields.texts("modules"),
        output=fields.flag("output"),
        elements=0 if cached else fields.count("elements", most=1 << 62),
        active=fields.count("active"),
        stored=fields.count("stored"),
        options=tuple(
            _option(Fields(_object(o, Path(fields.where)), fields.where)) for o in options
        ),
        cached=cached,
    )


def _option(fields: Fields) -> Option:
    document = {"rules": [fields.get("rule")], "kv_cache": fields.get("kv_cache")}
    recipe = parse_recipe(fields.where, document)
    (rule,) = recipe.rules
    return Option(
        candidates=fields.texts("candidates"),
        rule=replace(rule, patterns=()),
        nbytes=fields.count("nbytes", most=1 << 62),
        kv_cache=recipe.kv_cache,
    )
