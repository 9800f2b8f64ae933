"""Tests that need a GPU: make test-gpu. What they check lives in checks.py and runs on CPU too."""

NO_GPU = "no GPU: run make test-gpu where one is"
