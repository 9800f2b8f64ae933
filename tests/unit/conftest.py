"""A source checkpoint that tests of reading and verifying share."""

import pytest

from tests.unit import exported


@pytest.fixture(scope="module")
def weights():
    return exported.source_weights()


@pytest.fixture
def source(tmp_path, weights):
    return exported.write(tmp_path / "source", weights)
