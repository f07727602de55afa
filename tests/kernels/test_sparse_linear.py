import pytest
import torch

from backends.kernels import sparse_linear
from backends.kernels.sparse_linear import Tile
from tests.kernels.law import DTYPES, holds, random

PATTERNS = [(2, 4), (1, 4), (4, 8), (1, 2), (3, 8), (7, 16)]


@pytest.mark.parametrize(("count", "period"), PATTERNS)
def test_the_largest_are_kept_where_they_were(count, period):
    weight = random(5, 6 * period)
    values, positions = sparse_linear.compressed(weight, count, period)
    assert values.shape == (5, 6 * count)
    dense = sparse_linear.dense(values, positions, period, 6 * period)
    grouped, kept = weight.unflatten(1, (6, period)), dense.unflatten(1, (6, period))
    held = kept != 0
    assert torch.equal(kept[held], grouped[held])
    assert (held.sum(-1) == count).all()
    least = kept.abs().where(held, torch.inf).amin(-1)
    assert ((grouped * ~held).abs().amax(-1) <= least).all()


@pytest.mark.parametrize(("count", "period"), PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "widened"), [(1, False), (3, False), (5, True)])
def test_kernels_equal_reference(count, period, dtype, tokens, widened, monkeypatch):
    monkeypatch.setattr(sparse_linear, "TILES", {1 << 62: Tile(widened, 4, 64, 4, 1)})
    width = 11 * period
    inputs = sparse_linear.compressed(random(13, width, dtype=dtype), count, period)
    holds(sparse_linear, random(tokens, width, dtype=dtype), *inputs, period, length=width, rounded=widened)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64)])
def test_operation_equals_reference(shape, dtype):
    values, positions = sparse_linear.compressed(random(9, 64, dtype=dtype), 2, 4)
    x = random(*shape, dtype=dtype)
    for _ in range(2):
        expected = sparse_linear.reference(x.float(), values, positions, 4)
        actual = sparse_linear.sparse_linear(x, values, positions, 4)
        assert actual.dtype == dtype and actual.shape == expected.shape
        largest = expected.abs().max().item() if expected.numel() else 0.0
        summed = 4 * torch.finfo(torch.float32).eps * 64**0.5
        torch.testing.assert_close(
            actual.float(), expected, rtol=0, atol=(2 * torch.finfo(dtype).eps + summed) * largest
        )
        values.mul_(-2)


def test_gradients_are_those_of_the_reference():
    values, positions = sparse_linear.compressed(random(9, 64), 2, 4)
    x, above = random(3, 64).requires_grad_(), random(3, 9)
    found = torch.autograd.grad(
        sparse_linear.sparse_linear(x, values.requires_grad_(), positions, 4), (x, values), above
    )
    expected = torch.autograd.grad(sparse_linear.reference(x, values, positions, 4), (x, values), above)
    torch.testing.assert_close(found, expected)


def test_what_is_outside_says_why():
    inputs = sparse_linear.compressed(random(4, 12), 2, 4)
    assert "groups of 6" in sparse_linear.outside(random(1, 12), *inputs, 6)
