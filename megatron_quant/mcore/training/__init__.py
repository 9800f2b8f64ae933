"""Hooks for the training loops of Megatron-LM and Megatron-Bridge."""
