"""Groups of settings that the front door takes. Nothing here imports torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from megatron_quant.errors import ExportError, QuantError
from megatron_quant.search import COSTS, METHODS, NONE

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _at_least_one(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and (isinstance(value, bool) or value < 1):
            raise QuantError(f"--{name.replace('_', '-')} is {value}: give at least 1")


def parse_size(text: str, flag: str = "--max-shard-size") -> int:
    """Parse ``5GB``, ``200MB`` or a plain number to bytes; ExportError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ExportError(f"{flag} {text!r} is no size: write it as 5GB or 200MB")
    size = int(float(match.group(1)) * _UNITS[(match.group(2) or "").upper()])
    if size < 1:
        raise ExportError(f"{flag} {text!r} is below one byte: give at least a few MB")
    return size


Settings = TypeVar("Settings", bound="_Group")


class _Group:
    """A group of settings, whose fields are flags of the command line."""

    @classmethod
    def from_flags(cls: type[Settings], flags: Mapping[str, Any]) -> Settings:
        """Make the group of the flags that the command line has for its fields.

        flags: values by the flag's name, with underscores; others are ignored. A missing flag gets
        its default.
        """
        names = _names(cls)
        return cls(**{name: flags[flag] for name, flag in names.items() if flag in flags})


@dataclass(frozen=True, kw_only=True)
class Parallel(_Group):
    """How Megatron cuts the model over ranks. The fields are named like Megatron's flags.

    tp, pp, cp, ep, etp: tensor, pipeline, context, expert and expert-tensor parallel sizes.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    num_virtual_stages_per_pipeline_rank: int = 1
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes below one."""
        _at_least_one(self, *self.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Calibration(_Group):
    """The text that calibration runs, and how its statistics become scales.

    dataset: as ``--calib-dataset`` takes it. size: number of samples. seq_length: tokens per
    sample. batch_size: samples per forward. cold_experts: ``error`` stops at an expert that saw no
    token; ``layer-max`` gives it the largest amax of its layer. act_percentile: the percentage of
    a layer's input values that its scale covers; 100 clips nothing. tokenizer: the tokenizer's
    folder; None for the checkpoint's own. trust_remote_code: run the code that a tokenizer brings
    along; the model's is never run. save: a file that keeps what is measured, with
    ``keep_hessians`` the second moments of inputs too. load: such a file, used instead of
    measuring; no text is read. memory: of second moments that a rank holds at a time, as ``16GB``.
    experts: the experts whose inputs a token is measured for: ``routed``, ``all``, or a share of
    them such as ``0.25``. sequential: measure a layer's inputs behind those that gptq has rounded.
    """

    dataset: str = "stdlib"
    size: int = 512
    seq_length: int = 512
    batch_size: int = 4
    cold_experts: str = "error"
    act_percentile: float = 100.0
    tokenizer: str | Path | None = None
    trust_remote_code: bool = False
    save: Path | None = None
    load: Path | None = None
    keep_hessians: bool = False
    memory: str = "16GB"
    experts: str | float = "routed"
    sequential: bool = False

    def __post_init__(self) -> None:
        """Refuse counts below one, a percentage out of range, what excludes one another."""
        self._check_files()
        _at_least_one(self, "memory_bytes")
        for flag, said in (
            ("--calib-experts", self.expert_share is not None),
            ("--sequential", self.sequential),
        ):
            if said and self.load is not None:
                raise QuantError(
                    f"{flag} says what is measured, but --load-calibration measures nothing: leave "
                    "one of them out"
                )
        for name in ("size", "seq_length", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise QuantError(f"--calib-{name.replace('_', '-')} is {value}: give at least 1")
        if self.cold_experts not in ("error", "layer-max"):
            raise QuantError(
                f"--cold-experts is {self.cold_experts!r}: give one of error, layer-max"
            )
        if not 0 < self.act_percentile <= 100:
            raise QuantError(
                f"--act-percentile is {self.act_percentile:g}: give a percentage above 0, such as "
                "99.9; 100 clips nothing"
            )

    @property
    def memory_bytes(self) -> int:
        """Return ``memory`` in bytes."""
        return parse_size(self.memory, "--calib-memory")

    @property
    def expert_share(self) -> float | None:
        """Return the share of ``experts``, 1 for all; None for the routed ones."""
        if self.experts in ("routed", "all"):
            return 1.0 if self.experts == "all" else None
        try:
            share = float(self.experts)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise QuantError(
                f"--calib-experts is {self.experts}: give routed, all, or a share of each layer's "
                "experts above 0 and up to 1, such as 0.25"
            )
        return share

    def _check_files(self) -> None:
        if self.save is not None and self.load is not None:
            raise QuantError(
                "--save-calibration keeps what is measured, and --load-calibration measures "
                "nothing: leave one of them out"
            )
        if self.keep_hessians and self.save is None:
            raise QuantError("--keep-hessians goes with --save-calibration FILE: add it")
        if self.load is not None and self.act_percentile < 100:
            raise QuantError(
                "--act-percentile clips measured inputs, but --load-calibration measures nothing: "
                "give it to the run that saves the calibration"
            )


@dataclass(frozen=True, kw_only=True)
class Write(_Group):
    """How files are written.

    overwrite: replace a checkpoint that is there. resume: continue an unfinished one.
    max_shard_size: most tensor bytes per file, such as ``5GB``. io_threads: threads per rank that
    hash and write. fsync: make sure that everything is on the disk. verify: read everything back
    before the files get their names.
    """

    overwrite: bool = False
    resume: bool = False
    max_shard_size: str = "5GB"
    io_threads: int = 2
    fsync: bool = True
    verify: bool = True

    def __post_init__(self) -> None:
        """Refuse settings that exclude one another, and bad sizes or counts."""
        if self.overwrite and self.resume:
            raise ExportError(
                "--resume continues what --overwrite would remove: give one of them; --resume also "
                "continues an export that --overwrite began"
            )
        _at_least_one(self, "io_threads", "shard_bytes")

    @property
    def shard_bytes(self) -> int:
        """Return the most tensor bytes of a file; ExportError if that is no size."""
        return parse_size(self.max_shard_size)


@dataclass(frozen=True, kw_only=True)
class Serve(_Group):
    """Where the checkpoint will be served. Planning refuses what the engine cannot read.

    engine: ``vllm``, ``sglang`` or ``tensorrt-llm``; None if it is not known. tp: the server's
    tensor-parallel size.
    """

    engine: str | None = None
    tp: int | None = None


@dataclass(frozen=True, kw_only=True)
class AutoQuantize(_Group):
    """A search for the format of every place: the least loss within a number of bits.

    bits: most bits a weight, scales included; None searches nothing. formats: candidates, names of
    recipes or YAML files with commas between; leaving a place unquantized is always one. method:
    ``gradient`` or ``kl_div``. score_size: samples that are scored. checkpoint: a directory that
    keeps the scores; a search that was stopped goes on there. recipe: file for the found recipe.
    cost: ``weight`` counts what is stored, ``active`` what a token reads. context_length: with cost
    ``active``, tokens in the KV cache; its format is then chosen too, among those of the
    candidates and none. keep: fnmatch patterns of modules that stay unquantized. head: a
    safetensors file with the output layer, for a checkpoint that has none.
    """

    bits: float | None = None
    formats: str = "nvfp4,fp8"
    method: str = "gradient"
    score_size: int = 128
    checkpoint: Path | None = None
    recipe: Path | None = None
    cost: str = "weight"
    keep: tuple[str, ...] = ()
    head: Path | None = None
    context_length: int | None = None

    def __post_init__(self) -> None:
        """Refuse names and numbers that mean nothing."""
        object.__setattr__(self, "keep", tuple(self.keep))
        if self.score_size < 1:
            raise QuantError(f"--auto-quantize-score-size is {self.score_size}: give at least 1")
        for flag, value, known in (("method", self.method, METHODS), ("cost", self.cost, COSTS)):
            if value not in known:
                raise QuantError(
                    f"--auto-quantize-{flag} is {value!r}: give one of {', '.join(known)}"
                )
        self._check_context()
        if not self.candidates:
            raise QuantError(
                f"--auto-quantize-formats {self.formats!r} names no recipe: give some, such as "
                "nvfp4,fp8"
            )

    def _check_context(self) -> None:
        tokens, flag = self.context_length, "--auto-quantize-context-length"
        if tokens is not None and tokens < 1:
            raise QuantError(f"{flag} is {tokens}: give at least 1 token")
        if tokens is not None and self.cost != "active":
            raise QuantError(
                f"{flag} is for what a token reads: add --auto-quantize-cost active, or leave it "
                "out; a KV cache stores no weights"
            )

    @property
    def changed(self) -> str | None:
        """Return the first field that is not as it is by default; None if all are."""
        each = ((field.name, field.default) for field in fields(self))
        return next((name for name, default in each if getattr(self, name) != default), None)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Return the recipes of ``formats``, each once, without ``none``."""
        names = (name.strip() for name in self.formats.split(","))
        return tuple(dict.fromkeys(name for name in names if name and name != NONE))


_FLAGS = {
    "dataset": "calib_dataset",
    "size": "calib_size",
    "seq_length": "calib_seq_length",
    "batch_size": "calib_batch_size",
    "save": "save_calibration",
    "load": "load_calibration",
    "memory": "calib_memory",
    "experts": "calib_experts",
    "engine": "serve_engine",
}
"""Field -> its flag, if that has another name."""


def flags_of(options: object) -> dict[str, Any]:
    """Return flag -> value of a dataclass of options, as ``from_flags`` of the groups takes it."""
    found: dict[str, Any] = {}
    for name, value in vars(options).items():
        if isinstance(value, _Group):
            names = _names(type(value))
            found |= {flag: getattr(value, own) for own, flag in names.items()}
        else:
            found[name] = value
    return found


def _names(group: type) -> dict[str, str]:
    """Return field -> flag."""
    names = {f.name: _FLAGS.get(f.name, f.name) for f in fields(group)}
    if group is AutoQuantize:
        return {name: f"auto_quantize_{name}" for name in names}
    return names | {"tp": "serve_tp"} if group is Serve else names
