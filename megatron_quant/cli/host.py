"""Ready the host for a verb that builds a Megatron model."""


def ready_host() -> None:
    """Let Megatron run on the CPU if there is no GPU. Call it before anything imports Megatron."""
    import torch

    from megatron_quant import cpu

    if not torch.cuda.is_available():
        cpu.activate()
