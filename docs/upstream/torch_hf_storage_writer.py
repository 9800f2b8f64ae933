"""torch: HuggingFaceStorageWriter cannot consolidate uint8 and int32 tensors (packed weights).

python docs/upstream/torch_hf_storage_writer.py
"""

import sys
import tempfile
import warnings

import torch
from torch.distributed import checkpoint as dcp

warnings.filterwarnings("ignore")


def error(dtype: torch.dtype) -> str:
    """What saving one tensor of ``dtype`` with consolidation raises; "" where it works."""
    writer = dcp.HuggingFaceStorageWriter(
        path=tempfile.mkdtemp(), save_distributed=True, enable_consolidation=True
    )
    try:
        dcp.save({"w": torch.ones(4, 4, dtype=dtype)}, storage_writer=writer, no_dist=True)
        return ""
    except BaseException as e:
        return f"{type(e).__name__}: {str(e).strip().splitlines()[-1][:100]}"


errors = {str(d): error(d) for d in (torch.float32, torch.uint8, torch.int32)}
fault = not errors["torch.float32"] and any(errors.values())
print("torch", torch.__version__)
print(f"expected: a file for each dtype\nfound:    {errors}")
print("FAULT" if fault else "no fault")
sys.exit(0 if fault else 1)
