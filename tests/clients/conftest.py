"""Ranks of these tests are forks of a process that has Megatron-Bridge."""

from importlib.util import find_spec

from tests.dist import pool

if find_spec("megatron.bridge"):
    pool.PRELOADED.append("tests.clients.no_gpu")
