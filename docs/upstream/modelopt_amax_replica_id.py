"""ModelOpt: quantized TE grouped experts at TP 2 x EP 2 x ETP 1 cannot be saved.

The check that dist_checkpointing.save begins with is called alone: after its error on rank 0 the
other ranks of a save would wait for it.

    torchrun --nproc-per-node 4 docs/upstream/modelopt_amax_replica_id.py
"""

import tiny_moe as tiny

# isort: split
import modelopt.torch.quantization as mtq
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

tiny.start(tp=2, ep=2, etp=1)
built = tiny.model()
mtq.quantize(built, mtq.FP8_DEFAULT_CFG, tiny.forward)
group = mpu.get_data_parallel_group(with_context_parallel=True)
state = built.sharded_state_dict(metadata={"dp_cp_group": group})
replicas = {
    t.key: t.replica_id
    for t in nested_values(state)
    if isinstance(t, ShardedTensor) and t.key.endswith("2.linear_fc1.weight_quantizer._amax")
}
try:
    save_preprocess(state)
    error = None
except Exception as e:
    error = f"{type(e).__name__}: {str(e).splitlines()[0][:160]}"
ids = [list(by_key.values())[:1] for by_key in tiny.gathered(replicas)]
errors = [e for e in tiny.gathered(error) if e]
tiny.finish(
    "state that can be saved: of the ranks that hold one tensor, one is its main replica (all 0)",
    f"{errors[0] if errors else 'saved'}; replica ids of expert 2 by rank: {ids}",
    bool(errors),
)
