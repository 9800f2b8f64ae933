"""The ``ranks`` fixture: see tests/dist/pool.py for what it does and how to use it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.dist.pool import Ranks

_POOL = pytest.StashKey[Ranks]()


def pytest_collection_finish(session: pytest.Session) -> None:
    # The nursery is forked before the first test, so that it holds nothing that a test leaves
    # behind, and after the last import, so that it shares what was imported.
    used = any("ranks" in getattr(item, "fixturenames", ()) for item in session.items)
    if used and not session.config.option.collectonly:
        session.config.stash[_POOL] = Ranks()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _POOL in config.stash:
        config.stash[_POOL].close()


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Ranks:
    """``ranks(world_size, function, *args) -> list`` of each rank's return value."""
    return pytestconfig.stash[_POOL]
