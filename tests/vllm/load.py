"""Load checkpoints into vLLM's own model classes, and say what became of every tensor.

    python load.py OUT.json NAME=DIR ...

OUT.json has, by name: ``class``, the one that was built; ``missing``, parameters that nothing
filled; ``untaken``, tensors that the class skipped in silence; ``cast``, codes that were cast to
another type; or ``error``, what building or loading raised.
"""

import ast
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import without_gpu
from watch import Watch

UNFILLED = "Following weights were not initialized from checkpoint: "


def configured(directory: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=directory,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        load_format="safetensors",
        model_loader_extra_config={"enable_weights_track": True},
    ).create_engine_config()


def loaded(directory: str) -> dict[str, Any]:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = configured(directory)
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        start_group()
        model = initialize_model(vllm_config=config, model_config=config.model_config)
        loader, watch = get_model_loader(config.load_config), Watch()
        given = loader.get_all_weights
        loader.get_all_weights = lambda *args: watch.given_by(given(*args))
        missing = list[str]()
        try:
            with watch:
                loader.load_weights(model, config.model_config)
        except ValueError as e:
            if not str(e).startswith(UNFILLED):
                raise
            # Some classes fill a parameter and do not say so, or say so by another of its names.
            parameters = dict(model.named_parameters())
            missing = [
                name
                for name in sorted(ast.literal_eval(str(e).removeprefix(UNFILLED)))
                if parameters[name].untyped_storage().data_ptr() not in watch.filled
            ]
    return {
        "class": type(model).__name__,
        "missing": missing,
        "untaken": sorted(watch.given - watch.taken),
        "cast": sorted(set(watch.cast)),
    }


def start_group() -> None:
    """One rank, under the first model's config."""
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    if not torch.distributed.is_initialized():
        place = Path(tempfile.mkdtemp(), "group")
        init_distributed_environment(1, 0, f"file://{place}", 0, "gloo")
        initialize_model_parallel(1, 1)


def main() -> None:
    os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"
    without_gpu.stand_in_for_torchvision()
    without_gpu.inspect_classes_here()
    without_gpu.take_any_experts()
    without_gpu.take_any_linear()
    without_gpu.take_sparse_attention()
    without_gpu.know_configs("bailing_moe_v2", "bailing_hybrid")
    found: dict[str, Any] = {}
    for argument in sys.argv[2:]:
        name, _, directory = argument.partition("=")
        try:
            found[name] = loaded(directory)
        except Exception as e:
            lines = [line.strip() for line in str(e).splitlines() if line.strip()]
            found[name] = {"error": f"{type(e).__name__}: {' '.join(lines[:2])[:400]}"}
        print(name, found[name], flush=True)
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
