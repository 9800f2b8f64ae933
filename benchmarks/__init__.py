"""Measurements, each a module with a ``--help``."""
