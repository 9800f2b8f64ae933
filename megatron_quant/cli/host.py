"""The host that a verb with a Megatron model runs on."""


def ready_host() -> None:
    """Have Megatron run on the CPU where there is no GPU; before anything imports it."""
    import torch

    from megatron_quant import cpu

    if not torch.cuda.is_available():
        cpu.activate()
