"""Ready a test's process before it imports modelopt, megatron or transformer_engine.

    from tests.host import ready

    ready()
    import modelopt.torch.quantization as mtq  # noqa: E402

Each of the three decides while it is imported what the host can do, so this comes first; about
10 s of work, once per process. Functions that run under the ``ranks`` fixture need not call it.
"""

import os

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the check leaves CUDA forkable

import torch

from megatron_quant import cpu


def ready() -> None:
    """One thread, and the CPU room activated where there is no CUDA."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        cpu.activate()
