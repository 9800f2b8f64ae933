"""Adam on a host without a GPU, as megatron-core restores it; importing it puts it in place.

There it is torch's, which counts steps by parameter. megatron-core restores no such count, and its
optimizers then fail (0.16: ``KeyError: 'step'``). Here the count begins anew.
"""

import functools
from typing import Any

import torch


def _uncounted(setstate: Any) -> Any:
    @functools.wraps(setstate)
    def restored(self: Any, state: dict[str, Any]) -> None:
        bare = [held for held in state["state"].values() if "step" not in held]
        for held in bare:
            held["step"] = torch.tensor(0.0)
        setstate(self, state)
        for held in bare:
            del held["step"]

    return restored


def _counted(init_group: Any) -> Any:
    @functools.wraps(init_group)
    def begun(self: Any, group: Any, *rest: Any) -> Any:
        for held in (self.state[p] for p in group["params"]):
            if held:
                held.setdefault("step", torch.tensor(0.0))
        return init_group(self, group, *rest)

    return begun


torch.optim.AdamW.__setstate__ = _uncounted(torch.optim.AdamW.__setstate__)
torch.optim.AdamW._init_group = _counted(torch.optim.AdamW._init_group)
