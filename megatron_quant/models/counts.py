"""Check the counts that a config states against the tensors, before anything loops over them.

A config may claim a thousand million layers. Making something for each would end the process.
"""

from collections.abc import Iterable

from megatron_quant.documents import shown
from megatron_quant.engines.families import COUNTS
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.config import Config
from megatron_quant.models.stacks import Shape
from megatron_quant.models.text import text_config

_OF_TENSORS = (
    "num_hidden_layers",
    "num_layers",
    "num_nextn_predict_layers",
    *COUNTS,
)
"""Keys that count things of which each has a tensor of its own, or a slice of a stack."""


def check_counts(config: Config, shapes: Iterable[Shape]) -> None:
    """Refuse a count of more layers or experts than a checkpoint has tensors.

    Args:
        config: Content of config.json.
        shapes: Shapes of all tensors. Each slice of a stack (3-D or more) counts as one tensor.

    Raises:
        ArchitectureError: Names the key and both numbers.
    """
    tensors = sum(shape[0] if len(shape) > 2 and 0 not in shape else 1 for shape in shapes)
    text = text_config(config)
    for part, where in ((config, "config.json"), (text, "text_config of config.json")):
        for key in _OF_TENSORS:
            count = part.get(key)
            if isinstance(count, int | float) and count > tensors:
                raise ArchitectureError(
                    f"{key}={shown(count)} in {where}, but the checkpoint has {tensors} tensors; "
                    "correct config.json, or fetch the checkpoint again"
                )
