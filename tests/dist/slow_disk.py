"""``python -m tests.dist.slow_disk ARGV``: megatron_quant on a disk whose every call takes a while.

So a signal that comes when the writing has begun comes before its end.
"""

import os
import runpy
import time
from collections.abc import Callable
from typing import Any

SECONDS = 0.03
CALLS = ("pwrite", "fsync", "rename", "replace")


def slowed(real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        time.sleep(SECONDS)
        return real(*args, **named)

    return call


if __name__ == "__main__":
    for name in CALLS:
        setattr(os, name, slowed(getattr(os, name)))
    runpy.run_module("megatron_quant", run_name="__main__", alter_sys=True)
