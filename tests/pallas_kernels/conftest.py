"""What tests of compiled kernels share."""

import sys
from collections.abc import Iterator

import pytest

from tests.pallas_kernels import hopper


@pytest.fixture(scope="session")
def compiler() -> Iterator[hopper.Compiler]:
    """A process that compiles for a GPU that is not there."""
    if sys.platform != "linux":
        pytest.skip("NVIDIA's compiler runs on Linux")
    with hopper.Compiler() as compiler:
        yield compiler
