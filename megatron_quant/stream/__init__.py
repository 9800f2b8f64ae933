"""Quantizing a checkpoint file to file: no model, no forward, one part of a tensor at a time."""
