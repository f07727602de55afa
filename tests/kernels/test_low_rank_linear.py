import pytest
import torch

from backends.kernels import low_rank_linear
from backends.kernels.low_rank_linear import Tile
from tests.kernels.law import DTYPES, holds, random

DESIGNS = {
    "grid": Tile("grid", 16, 32, 16, 16, programs=1, warps=4, ahead=64),
    "slices": Tile("slices", 16, 32, 16, 0, programs=1, warps=4),
    "launches": Tile("launches", 16, 32, 16, 16, programs=1, warps=4),
}


def factors(k, r, n, dtype):
    return random(r, k, dtype=dtype, seed=1) / k**0.5, random(n, r, dtype=dtype, seed=2) / r**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("tokens", [(), (3, 2), (0,)])
def test_equals_reference(tokens, biased, dtype):
    down, up = factors(40, 24, 33, dtype)
    x, bias = random(*tokens, 40, dtype=dtype), random(33, dtype=dtype, seed=3)
    holds(low_rank_linear, x, down, up, bias if biased else None, length=40 + 24, rounded=True)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (100, 5, 7), (65, 33, 40), (64, 48, 200)])
@pytest.mark.parametrize("tokens", [1, 16])
def test_designs_equal_reference(tokens, sizes, design):
    down, up = factors(*sizes, torch.bfloat16)
    x, bias = random(tokens, sizes[0], dtype=torch.bfloat16), random(sizes[2], dtype=torch.bfloat16, seed=3)
    length = sizes[0] + sizes[1]
    holds(low_rank_linear, x, down, up, bias, length=length, rounded=True, tile=DESIGNS[design])


def test_many_tokens_are_computed_by_torch():
    down, up = factors(8, 4, 6, torch.float32)
    assert "17 tokens" in low_rank_linear.outside(random(17, 8), down, up, None)


def test_operation_and_its_gradients_are_those_of_torch():
    down, up = factors(8, 4, 6, torch.float32)
    inputs = (random(2, 3, 8), down, up, random(6, seed=3))
    for value in inputs:
        value.requires_grad_()
    actual, expected = low_rank_linear.low_rank_linear(*inputs), low_rank_linear.reference(*inputs)
    torch.testing.assert_close(actual, expected)
    found = torch.autograd.grad(actual.square().sum(), inputs)
    for one, other in zip(found, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(one, other)
