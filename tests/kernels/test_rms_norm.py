import pytest
import torch

from backends.kernels import rms_norm
from tests.kernels.law import DTYPES, holds, random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 100), (2, 1), (7, 1500), (0, 8)])
def test_equals_reference(shape, added, dtype):
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight = random(shape[-1], dtype=dtype, seed=2)
    holds(rms_norm, x, residual if added else None, weight, 1e-5, length=shape[-1])


def test_gradients_are_those_of_the_reference():
    x, residual, weight = random(3, 16), random(3, 16, seed=1), random(16, seed=2)
    for value in (x, residual, weight):
        value.requires_grad_()
    inputs = (x, residual, weight)
    actual = torch.autograd.grad(rms_norm.rms_norm(*inputs, 1e-5)[0].square().sum(), inputs)
    expected = torch.autograd.grad(rms_norm.reference(*inputs, 1e-5)[0].square().sum(), inputs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
