"""ModelOpt: its Megatron exporter is switched off in silence where Megatron-Core is 0.16.1.

torchrun --nproc-per-node 1 docs/upstream/modelopt_megatron_exporter.py
"""

import tempfile

import tiny_moe as tiny

# isort: split
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_mcore_gpt_to_hf, unified_export_megatron

tiny.start(tp=1, ep=1, etp=1)
built = tiny.model()
mtq.quantize(built, mtq.FP8_DEFAULT_CFG, tiny.forward)
try:
    import megatron.core.models.hybrid.hybrid_model  # noqa: F401

    missing = ""
except ImportError as e:
    missing = f" ({e})"
try:
    export_mcore_gpt_to_hf(built, "Qwen/Qwen3-30B-A3B", export_dir=tempfile.mkdtemp())
    text = "exported"
except Exception as e:
    text = f"{type(e).__name__}: {e}"
off = not unified_export_megatron.has_mcore
tiny.finish(
    "an export, or an error that names the Megatron-Core that is needed",
    f"has_mcore is {not off}{missing}; {text}",
    off,
)
