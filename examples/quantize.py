"""Quantize a Hugging Face checkpoint through Megatron, at any TP x EP, on GPUs or CPUs.

torchrun --nproc-per-node 4 examples/quantize.py \
    --hf-model-id PATH --export-quant-cfg nvfp4 --tp 2 --ep 2 --weight-only --export-dir OUT
"""

import sys

from megatron_quant.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
