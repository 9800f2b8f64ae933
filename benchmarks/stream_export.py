"""Streaming export against a plain copy and against other exporters, in interleaved turns.

    python -m benchmarks.stream_export --gb 0.5 --turns 3
    python -m benchmarks.stream_export --gb 4 --write docs/performance.md

Every run is a process of its own with one thread. CPU seconds and wall time are of the work alone,
without imports and without verifying, which has a column of its own; memory is the process's peak.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file

from benchmarks.report import host, replace_measured, table

_SHARD = 500_000_000
_EXPERTS, _HIDDEN, _FFN, _VOCAB = 32, 2048, 768, 16384
_CONFIG: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": _HIDDEN,
    "intermediate_size": 4 * _FFN,
    "moe_intermediate_size": _FFN,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": _EXPERTS,
    "num_experts_per_tok": 4,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
_FORMATS = {
    "fp8": {"export_quant_cfg": "fp8", "export_format": "compressed-tensors"},
    "nvfp4": {"export_quant_cfg": "w4a16_nvfp4", "export_format": "modelopt"},
    "int4": {"export_quant_cfg": "int4", "export_format": "compressed-tensors"},
}


def make_checkpoint(directory: Path, gigabytes: float) -> Path:
    """A Qwen3-MoE checkpoint of about that size with random weights, in shards of half a GB."""
    from megatron_quant.models import lookup

    layer = (_EXPERTS * 3 * _FFN + 40 * 128) * _HIDDEN * 2
    layers = max(round((gigabytes * 1e9 - 4 * _VOCAB * _HIDDEN) / layer), 1)
    config = {**_CONFIG, "num_hidden_layers": layers}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    noise = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.05
    where: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(where.values())):05d}.safetensors"
        save_file(held, directory / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(held, file))
        held.clear()

    for param in lookup(config).params(config):
        for source in param.sources:
            count = torch.Size(source.shape).numel()
            held[source.name] = noise[:count].view(source.shape).clone()
        if sum(t.nbytes for t in held.values()) > _SHARD:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


_HEADER = "GB|what|CPU s|of copy|wall s|peak RSS, GB|verify, CPU s"


class Clock:
    """Phases as ``stream`` asks for them; CPU and wall seconds of each."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """A phase."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu[name] = time.process_time() - cpu
        self.wall[name] = time.perf_counter() - wall

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A phase with steps, which are not shown."""
        with self.time(name):
            yield lambda steps: None


def _copy(source: Path, out: Path, clock: Clock) -> None:
    out.mkdir()
    with clock.time("copy"):
        for file in sorted(source.glob("*.safetensors")):
            save_file(load_file(file), out / file.name, metadata={"format": "pt"})


def _ours(source: Path, out: Path, clock: Clock, fmt: str) -> None:
    from megatron_quant.api.options import QuantizeOptions
    from megatron_quant.api.stream import stream
    from megatron_quant.dist import Groups

    options = QuantizeOptions(str(source), export_dir=out, weight_only=True, **_FORMATS[fmt])
    stream(options, Groups(), clock)


def _modelopt(source: Path, out: Path, clock: Clock, fmt: str) -> None:
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


def _model_free(source: Path, out: Path, clock: Clock, fmt: str) -> None:
    from llmcompressor import model_free_ptq

    scheme = {"fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4A16", "int4": "W4A16"}[fmt]
    with clock.time("export"):
        ignore = ["lm_head", "re:.*mlp.gate$"]
        model_free_ptq(str(source), str(out), scheme, ignore=ignore, max_workers=1, device="cpu")


_TOOLS = {"ours": _ours, "ModelOpt": _modelopt, "model_free_ptq": _model_free}
_NEEDS = {"ModelOpt": "modelopt", "model_free_ptq": "llmcompressor"}


def run_worker(tool: str, source: Path, out: Path, fmt: str) -> None:
    """In a process of its own: do the work and print what it took."""
    clock = Clock()
    if tool == "copy":
        _copy(source, out, clock)
    else:
        _TOOLS[tool](source, out, clock, fmt)
    verify = (clock.cpu.pop("verify", 0.0), clock.wall.pop("verify", 0.0))
    peak = _peak_rss()
    took = {"cpu": sum(clock.cpu.values()), "wall": sum(clock.wall.values())}
    print(json.dumps({**took, "verify": verify[0], "rss": peak, "phases": clock.cpu}))


def _peak_rss() -> int:
    """Bytes; of this program alone, where getrusage counts what it was forked from too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure(tool: str, fmt: str, source: Path, out: Path) -> dict[str, float] | str:
    """What one run took, or the last line of why it failed."""
    argv = [sys.executable, "-m", "benchmarks.stream_export", "--worker", tool, fmt]
    done = subprocess.run(
        [*argv, str(source), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:80]
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(gigabytes: float, turns: int, tools: list[str], folder: Path) -> Iterator[list[str]]:
    """Rows of one checkpoint: every tool and format once a turn, in turns."""
    source = make_checkpoint(folder / "source", gigabytes)
    runs = [("copy", ""), *((tool, fmt) for fmt in _FORMATS for tool in tools)]
    found: dict[tuple[str, str], list[dict[str, float]]] = {run: [] for run in runs}
    failed: dict[tuple[str, str], str] = {}
    for _ in range(turns):
        for run in runs:
            took = measure(*run, source, folder / "out")
            if isinstance(took, str):
                failed[run] = took
            else:
                found[run].append(took)
    size = sum(p.stat().st_size for p in source.glob("*.safetensors")) / 1e9
    shutil.rmtree(source)
    base = _median(found["copy", ""], "cpu")
    for run, took in found.items():
        name = f"{run[1]} {run[0]}".strip()
        if run in failed:
            yield [f"{size:.2f}", name, "fails: " + failed[run], "", "", "", ""]
            continue
        cpu = _median(took, "cpu")
        row = [f"{cpu:.2f}", f"{cpu / base:.2f}x", f"{_median(took, 'wall'):.2f}"]
        verify = _median(took, "verify")
        yield [
            f"{size:.2f}",
            name,
            *row,
            f"{_median(took, 'rss') / 1e9:.2f}",
            f"{verify:.2f}" if verify else "-",
        ]


def _median(took: list[dict[str, float]], key: str) -> float:
    return median(t[key] for t in took)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--gb", type=float, default=0.5, help="of the smallest checkpoint (default 0.5)")
    p.add_argument("--growth", type=int, nargs="*", default=[1, 2], help="its multiples")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--tools", nargs="*", default=list(_TOOLS), choices=list(_TOOLS))
    p.add_argument("--folder", type=Path, help="where checkpoints are made (default: temporary)")
    p.add_argument("--write", type=Path, help="page whose measured part is replaced")
    p.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        tool, fmt, source, out = args.worker
        run_worker(tool, Path(source), Path(out), fmt)
        return
    tools = [t for t in args.tools if t not in _NEEDS or find_spec(_NEEDS[t])]
    for tool in _NEEDS.keys() & set(args.tools) - set(tools):
        print(f"{tool}: left out, {_NEEDS[tool]} is not installed")
    rows = []
    for factor in args.growth:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows += list(compare(args.gb * factor, args.turns, tools, Path(folder)))
    title = f"One thread of {host()}; torch {torch.__version__}; medians of {args.turns} turns."
    measured = table(title, _HEADER, rows)
    print(measured)
    if args.write:
        replace_measured(args.write, measured)


if __name__ == "__main__":
    main()
