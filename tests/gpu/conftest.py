"""Every test here has the marker ``gpu``, and is skipped with the reason where there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.gpu import NO_GPU

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(scope="module")
def one_rank() -> Iterator[str]:
    """Megatron's process groups of one rank in this process; the device's name."""
    from tests.dist import tiny

    dist.init_process_group()
    tiny.start()
    yield "cuda"
    dist.destroy_process_group()
