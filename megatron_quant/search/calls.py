"""Keep what a module is called with and what it returns, to run it again."""

from typing import Any

import torch


def first_output(output: Any) -> torch.Tensor:
    """Return a module's output, or the first of several."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def detached(value: Any) -> Any:
    """Return an argument without its gradient: a tensor, a tuple of such, or anything else."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    return tuple(map(detached, value)) if isinstance(value, tuple) else value
