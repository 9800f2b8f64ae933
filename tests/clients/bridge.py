"""Scripts as users of Megatron-Bridge write them; for functions that run under ``ranks``."""

from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.training.callbacks import CallbackManager
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    LoggerConfig,
    MockGPTDatasetConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain as bridge_pretrain

from megatron_quant import cpu

SEQUENCE = 32


def provider(source: Path, tp: int = 1, ep: int = 1, pp: int = 1, **fields: Any) -> Any:
    """The model's provider at a layout, with the weights of ``source`` to be loaded."""
    made = AutoBridge.from_hf_pretrained(str(source)).to_megatron_provider(load_weights=True)
    settings = {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1,
        "pipeline_model_parallel_size": pp,
        "sequence_parallel": tp > 1,
        "seq_length": SEQUENCE,
        "pipeline_dtype": torch.bfloat16,
        "params_dtype": torch.bfloat16,
        "bf16": True,
        **cpu.transformer_config_overrides(),
        **fields,
    }
    for name, value in settings.items():
        setattr(made, name, value)
    made.finalize()
    return made


def config(made: Any, run: Path, steps: int, **checkpoint: Any) -> ConfigContainer:
    """Pretraining for ``steps`` steps of 4 sequences of random tokens, saved into ``run``."""
    vocabulary = made.vocab_size
    return ConfigContainer(
        model=made,
        train=TrainingConfig(
            train_iters=steps,
            global_batch_size=4,
            micro_batch_size=1,
            eval_iters=0,
            eval_interval=1000,
        ),
        optimizer=OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-3, bf16=True, use_distributed_optimizer=True
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="constant", start_weight_decay=0.0, end_weight_decay=0.0
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        dataset=MockGPTDatasetConfig(
            seq_length=SEQUENCE,
            random_seed=1,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            dataloader_type="single",
            num_workers=0,
        ),
        logger=LoggerConfig(log_interval=1),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=vocabulary - 1),
        checkpoint=CheckpointConfig(
            save=str(run), load=str(run), async_save=False, fully_parallel_save=False, **checkpoint
        ),
        dist=DistributedInitConfig(distributed_backend="gloo"),
        rng=RNGConfig(seed=1),
    )


def pretrain(made: Any, callback: Any, run: Path, steps: int, **checkpoint: Any) -> Any:
    """Bridge's own loop; returns the model, which its events bring."""
    made.initialize_model_parallel(seed=1)  # its loop seeds the ranks of GPUs alone
    kept: list[Any] = []
    manager = CallbackManager()
    manager.add([callback] if callback else [])
    manager.register("on_train_start", lambda context: kept.append(context.model))
    bridge_pretrain(config(made, run, steps, **checkpoint), forward_step, callbacks=manager)
    return kept[0]
