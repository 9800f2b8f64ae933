"""Load some of a transformers model's weights, by what ``from_pretrained`` does with all of them.

The only file that knows the parts of transformers' loader (5.x). Where they are missing, importing
it fails, and models are loaded whole.
"""

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from megatron_quant.streaming.model import quiet


def make_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Compute the buffers that no checkpoint stores, such as frequencies of rotations."""
    nothing = LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._finalize_model_loading(model, LoadStateDictConfig(dtype=dtype), nothing)


def load_part(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Give ``model`` what ``tensors`` hold, by the checkpoint's names; leave the rest as it is.

    Returns name, shape and wanted shape of each tensor that does not fit.
    """
    steps = get_model_conversion_mapping(model)
    how = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=[s for s in steps if isinstance(s, WeightConverter | WeightRenaming)],
    )
    with quiet():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, how)
    return sorted((n, tuple(found), tuple(wanted)) for n, found, wanted in info.mismatched_keys)
