"""A live, attached model on a rank, from a checkpoint directory; for tests of layers and calib.

Import it in functions that run under the ``ranks`` fixture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_quant.calib.calibration import CalibrationReport, ColdExperts, InputRules, calibrate
from megatron_quant.calib.data import shard
from megatron_quant.ckpt.plan.ranks import Layout
from megatron_quant.ckpt.read.open import open_source
from megatron_quant.ckpt.plan.quantizable import slots
from megatron_quant.layers.install import ExpertScales, QuantLayer, attach
from megatron_quant.mcore.model.load import LiveModel, load_model
from megatron_quant.mcore.model.parallel import start_distributed
from megatron_quant.mcore.model.schedule import forward, own_share
from megatron_quant.models import Pipeline, lookup, num_experts, num_layers
from megatron_quant.recipes.load import load_recipe
from megatron_quant.recipes.plan import QuantPlan
from megatron_quant.recipes.resolution import resolve
from megatron_quant.recipes.schema import weight_only


@dataclass(frozen=True)
class Parallelism:
    """How the ranks share the model; data parallelism is what is left."""

    tp: int = 1
    ep: int = 1
    etp: int = 1
    pipeline: Pipeline = Pipeline()


@dataclass(frozen=True)
class Attached:
    """A model with quantizers, not yet calibrated."""

    model: LiveModel
    plan: QuantPlan
    layers: list[QuantLayer]

    def calibrate(
        self,
        batches: Sequence[torch.Tensor] = (),
        cold_experts: ColdExperts = ColdExperts.ERROR,
    ) -> CalibrationReport:
        """On ``batches`` ([B, S] ids), which data-parallel ranks share."""
        return calibrate(
            self.layers,
            self.plan,
            self.model.groups,
            self.forwards(batches),
            InputRules(cold_experts=cold_experts, token_replicas=self.model.layout.etp_size),
        )

    def forwards(self, batches: Sequence[torch.Tensor]) -> list[Callable[[], None]]:
        """This data-parallel rank's."""
        return [partial(forward, self.model.module, batch) for batch in own_share(batches)]


def load(
    path: Path, parallelism: Parallelism = Parallelism(), dtype: torch.dtype = torch.bfloat16
) -> LiveModel:
    """The checkpoint's model at ``parallelism``."""
    checkpoint = open_source(path)
    architecture = lookup(checkpoint.config)
    params, p = architecture.params(checkpoint.config), parallelism
    stages = p.pipeline.stages(num_layers(params))
    layout = Layout.simulate(
        dist.get_world_size(), p.tp, p.ep, p.etp, num_experts(params), stages
    )
    groups = start_distributed()
    return load_model(checkpoint, architecture, layout, groups, dtype, lambda steps: None)


def with_quantizers(
    model: LiveModel,
    recipe: str,
    expert_scales: ExpertScales = ExpertScales.SHARED,
    *,
    weights_alone: bool = False,
) -> Attached:
    """``model`` with the quantizers of a shipped recipe attached."""
    chosen = load_recipe(recipe)
    if weights_alone:
        chosen = weight_only(chosen)
    plan = resolve(chosen, slots(model.params))
    weights = [local.weight for local in model.local]
    return Attached(model, plan, attach(model.module, plan, weights, expert_scales))


def batches(count: int, size: int = 2, length: int = 32, vocab: int = 258) -> list[torch.Tensor]:
    """Seeded token ids, [size, length] each."""
    generator = torch.Generator().manual_seed(3)
    return list(torch.randint(vocab, (count, size, length), generator=generator))
