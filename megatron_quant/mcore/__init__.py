"""Megatron-Core: live models, their checkpoints, their training loops."""
