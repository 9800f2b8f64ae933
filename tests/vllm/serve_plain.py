"""Do what serve.py does, with layers that plain.py decodes; with the same arguments.

OUT.json has ``error`` alone where the model does not run.
"""

import json
import sys
import traceback
from pathlib import Path

import plain
import serve
import without_gpu


def said(error: Exception) -> str:
    """Its type, and its words or, without any, the line that raised it."""
    lines = str(error).strip().splitlines() or [traceback.extract_tb(error.__traceback__)[-1].line]
    return f"{type(error).__name__}: {lines[0]}"


def main() -> None:
    without_gpu.stand_in_for_torchvision()
    without_gpu.inspect_classes_here()
    take_back = without_gpu.take_any_experts()
    without_gpu.take_any_linear()
    without_gpu.know_configs("bailing_moe_v2", "bailing_hybrid")
    plain.decode_after_loading(take_back)
    try:
        serve.main()
    except Exception as e:
        Path(sys.argv[3]).write_text(json.dumps({"error": said(e)}))


if __name__ == "__main__":
    main()
