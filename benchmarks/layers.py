"""Calibration layer by layer against the whole model: peak memory and seconds as layers are added.

Every run is a process of its own with one thread. Memory is the most that the process held beyond
what it had before: of its own (anonymous), and with mapped files, which the system may take back.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.checkpoint import make_layers
from benchmarks.report import host, replace_measured, table

_HEADER = (
    "layers|weights, GB|how|peak memory, GB|with mapped files, GB|planned weights, GB|s|s a layer"
)
_WAYS = {"layers": "layer by layer", "whole": "the whole model"}
_ROOT = Path(__file__).parents[1]


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the parser."""
    p = verbs.add_parser("layers", help="calibration layer by layer, against the whole model")
    p.add_argument("--layers", type=int, nargs="*", default=[4, 8, 16])
    p.add_argument("--experts", type=int, default=16)
    p.add_argument("--samples", type=int, default=8, help="of 256 tokens")
    p.add_argument("--folder", type=Path, help="where checkpoints are made (default: temporary)")
    p.add_argument("--write", type=Path, help="page whose part measured here is replaced")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure and print the table."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for layers in args.layers:
            source = make_layers(Path(folder) / f"{layers}", layers, args.experts)
            for way in _WAYS:
                rows.append(_row(layers, way, _measured(way, source, args.samples)))
                print(rows[-1], file=sys.stderr, flush=True)
    about = (
        f"One thread of {host()}; torch {torch.__version__}; {args.samples * 256} tokens through a "
        f"Qwen3-MoE of {args.experts} experts."
    )
    measured = table(about, _HEADER, rows)
    print(measured)
    if args.write:
        replace_measured(args.write, measured, "layers")


def _measured(way: str, source: Path, samples: int) -> dict[str, float]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    argv = [sys.executable, "-m", "benchmarks.layers", way, str(source), str(samples)]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _row(layers: int, way: str, found: dict[str, float]) -> list[str]:
    sizes = [found[key] / 1e9 for key in ("own", "all", "planned")]
    weights = f"{found['weights'] / 1e9:.2f}"
    return [
        str(layers),
        weights,
        _WAYS[way],
        *(f"{size:.2f}" for size in sizes[:2]),
        f"{sizes[2]:.2f}" if way == "layers" else weights,
        f"{found['seconds']:.1f}",
        f"{found['seconds'] / layers:.2f}",
    ]


@contextmanager
def _watched(found: dict[str, float]) -> Iterator[None]:
    """Sample this process's memory, and put its peaks beyond the first sample into ``found``."""
    done = threading.Event()
    before = _memory()
    found |= {"own": 0.0, "all": 0.0}

    def sample() -> None:
        while not done.wait(0.005):
            now = _memory()
            for key in before:
                found[key] = max(found[key], now[key] - before[key])

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    try:
        yield
    finally:
        found["seconds"] = time.perf_counter() - start
        done.set()
        sampler.join()


def _memory() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return {"own": int(values["RssAnon"]) * 1024.0, "all": int(values["VmRSS"]) * 1024.0}


def _work(way: str, source: Path, samples: int) -> dict[str, float]:
    """Do it in this process."""
    import megatron_quant as mq
    from megatron_quant.streaming import static_inputs

    job = mq.plan(source, "nvfp4", stream=True)
    params = static_inputs(job.quant, job.params)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (samples, 256), generator=generator).split(1)
    memory = job.layer_memory
    assert memory is not None
    weights = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    found = {"planned": float(memory.weights), "weights": float(weights)}
    calibrate: Callable[..., None] = _by_layers if way == "layers" else _at_once
    # Whatever transformers imports and builds once is there before the measured turn.
    warm = make_layers(source.with_name(f"{source.name}-warm"), 1, 4)
    of_warm = mq.plan(warm, "nvfp4", stream=True)
    calibrate(warm, static_inputs(of_warm.quant, of_warm.params), ids[:1])
    shutil.rmtree(warm)
    with _watched(found):
        calibrate(source, params, ids)
    return found


def _by_layers(source: Path, params: list, ids: tuple[torch.Tensor, ...]) -> None:
    from megatron_quant.ckpt.read import open_stored
    from megatron_quant.ckpt.write import Existing
    from megatron_quant.dist import Groups
    from megatron_quant.streaming import Skeleton, Walk, Workplace

    place = Workplace(source.with_name("work"), "it", Existing.REPLACE, Groups())
    skeleton = Skeleton(open_stored(source), torch.bfloat16)
    walk = Walk(skeleton=skeleton, params=params, batches=ids, place=place, on_batch=lambda n: None)
    walk.run()
    place.remove()


def _at_once(source: Path, params: list, ids: tuple[torch.Tensor, ...]) -> None:
    from megatron_quant.streaming import WeightInputAmax, load_model, run_model, watched

    model = load_model(source, torch.bfloat16)
    with torch.no_grad(), WeightInputAmax(watched(model, params)):
        for batch in ids:
            run_model(model, batch)


if __name__ == "__main__":
    print(json.dumps(_work(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
