"""Kernels run on the GPU where there is one, and otherwise in Triton's interpreter, which must be chosen beforehand."""

import pytest

from tests.kernels.law import RUNS


@pytest.fixture(autouse=True)
def _runs():
    if not RUNS:
        pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1 in the environment, as `make test` sets it")
