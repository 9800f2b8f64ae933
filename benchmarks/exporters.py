"""Run one export by one tool, in its own process, and report its cost.

    python -m benchmarks.exporters TOOL FORMAT SOURCE SMALLEST OUT

The tool first exports the smallest checkpoint. That call has the cost of imports, compilation and
whatever else is done once, so that the figures of the work itself do not.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_TURNS = 3
FORMATS = {
    "fp8": {"export_quant_cfg": "fp8", "export_format": "compressed-tensors"},
    "nvfp4": {"export_quant_cfg": "w4a16_nvfp4", "export_format": "modelopt"},
    "int4": {"export_quant_cfg": "int4", "export_format": "compressed-tensors"},
}


class Clock:
    """Phases as the API asks for them, with CPU and wall seconds of each."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}
        self._inner = (0.0, 0.0)  # CPU and wall seconds of phases that ended within the open one

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time a phase; what a phase within it takes counts for that one alone."""
        before, self._inner = self._inner, (0.0, 0.0)
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        self.cpu[name] = self.cpu.get(name, 0.0) + cpu - self._inner[0]
        self.wall[name] = self.wall.get(name, 0.0) + wall - self._inner[1]
        self._inner = (before[0] + cpu, before[1] + wall)

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A phase with steps, which are not shown."""
        with self.time(name):
            yield lambda steps: None

    transfer = bar


def copy(source: Path, out: Path, clock: Clock, fmt: str) -> None:
    """Read and write the files with safetensors."""
    out.mkdir()
    with clock.time("copy"):
        for file in sorted(source.glob("*.safetensors")):
            save_file(load_file(file), out / file.name, metadata={"format": "pt"})


def ours(source: Path, out: Path, clock: Clock, fmt: str) -> None:
    """``quantize --stream``; on several ranks where torchrun started them."""
    from megatron_quant.dist import Groups
    from megatron_quant.runs.file_to_file import stream_files as stream
    from megatron_quant.runs.options import QuantizeOptions

    options = QuantizeOptions.from_flags(
        hf_model_id=str(source), export_dir=out, weight_only=True, **FORMATS[fmt]
    )
    stream(options, Groups(), clock)


def modelopt(source: Path, out: Path, clock: Clock, fmt: str) -> None:
    """ModelOpt's calibration with one sample, and its ``export_hf_checkpoint``."""
    from megatron_quant import cpu

    if not torch.cuda.is_available():
        cpu.activate()  # ModelOpt's plugins import Transformer Engine
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    preset = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG", "int4": "INT4_AWQ_CFG"}[fmt]
    ids = torch.arange(64).view(1, 64)
    with clock.time("export"):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        mtq.quantize(model, getattr(mtq, preset), lambda m: m(ids))
        export_hf_checkpoint(model, export_dir=out)


def model_free_ptq(source: Path, out: Path, clock: Clock, fmt: str) -> None:
    """llm-compressor's."""
    from llmcompressor import model_free_ptq

    scheme = {"fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4A16", "int4": "W4A16"}[fmt]
    ignore = ["lm_head", "re:.*embed_tokens.*", "re:.*mlp.gate$", "re:.*norm.*"]
    with clock.time("export"):
        model_free_ptq(str(source), str(out), scheme, ignore=ignore, max_workers=1, device="cpu")


TOOLS = {"copy": copy, "ours": ours, "ModelOpt": modelopt, "model_free_ptq": model_free_ptq}


def peak_rss() -> int:
    """Bytes; of this program alone, where getrusage counts what it was forked from too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def took(tool: str, fmt: str, source: Path, smallest: Path, out: Path) -> dict[str, float]:
    """Return CPU seconds of the first call and of the work, its wall seconds, and peak bytes.

    The work is done several times, and the least of each counts: on a host that lends memory to its
    machines, pages that were free for a while cost ten times as much as others.
    """
    TOOLS[tool](smallest, out.with_name("first"), Clock(), fmt)
    first = time.process_time()
    _remove(out.with_name("first"))
    turns = [_turn(tool, fmt, source, out) for _ in range(_TURNS)]
    least = {key: min(turn[key] for turn in turns) for key in turns[0]}
    return {**least, "first": first, "rss": peak_rss()}


def _turn(tool: str, fmt: str, source: Path, out: Path) -> dict[str, float]:
    clock = Clock()
    TOOLS[tool](source, out, clock, fmt)
    _remove(out)
    verify = clock.cpu.pop("verify", 0.0)
    clock.wall.pop("verify", 0.0)
    return {"cpu": sum(clock.cpu.values()), "wall": sum(clock.wall.values()), "verify": verify}


def _remove(folder: Path) -> None:
    """Remove the folder on one rank, when all are done with it."""
    together = torch.distributed.is_initialized()
    if together:
        torch.distributed.barrier()
    if not together or torch.distributed.get_rank() == 0:
        shutil.rmtree(folder)
    if together:
        torch.distributed.barrier()


def main() -> None:
    """Export on every rank; print as JSON the ranks' sums, and the largest rank's peak."""
    tool, fmt, *paths = sys.argv[1:]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    found = [took(tool, fmt, *map(Path, paths))]
    if world > 1:
        gathered: list[dict[str, float]] = [{}] * world
        torch.distributed.all_gather_object(gathered, found[0])
        found = gathered
    if int(os.environ.get("RANK", "0")) == 0:
        merged = {k: sum(f[k] for f in found) for k in ("cpu", "first", "verify")}
        merged |= {k: max(f[k] for f in found) for k in ("wall", "rss")}
        print(json.dumps(merged), flush=True)
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
