"""ModelOpt: of learned attention sinks a distributed checkpoint has one rank's heads alone.

torchrun --nproc-per-node 2 docs/upstream/modelopt_sinks_tp.py
"""

import tiny_moe as tiny

# isort: split
import modelopt.torch.quantization as mtq
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel

KEY = "core_attention.softmax_offset"  # of a layer, or stacked of all


def sinks(built: GPTModel) -> int:
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    state = built.sharded_state_dict(metadata={"dp_cp_group": group})
    tensors = (t for t in nested_values(state) if isinstance(t, ShardedTensor))
    return next(t.global_shape[-1] for t in tensors if t.key.endswith(KEY))


tiny.start(tp=2, ep=1, etp=1)
built = tiny.model("learnable")
before = sinks(built)
mtq.quantize(built, mtq.FP8_DEFAULT_CFG, tiny.forward)
after = sinks(built)
tiny.finish(f"{before} sinks a layer, as before", f"{after}", after != before)
