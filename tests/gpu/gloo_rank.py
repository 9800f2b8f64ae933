"""``python -m megatron_quant`` on ranks that share one GPU, over gloo: NCCL refuses to."""

import os
import sys

import torch.distributed as dist

from megatron_quant.cli.main import main

if __name__ == "__main__":
    dist.init_process_group("gloo")
    os.environ["LOCAL_RANK"] = "0"  # every rank on the first GPU
    sys.exit(main())
