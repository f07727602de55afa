import pytest
import torch

from backends.kernels import packed_swiglu
from backends.kernels.packed_linear import Tile
from tests.kernels.law import DTYPES, holds, random
from tests.kernels.test_packed_linear import packed

TILES = {
    "matrix": Tile("matrix", 16, 16, 2, 4, 2),
    "widened": Tile("widened", 1, 8, 2, 4, 1),
}


def weights(rows, width, bits, group, symmetric, dtype):
    """Both weights, small enough that the gate is not saturated."""
    pair = [packed(random(rows, width, seed=seed) / width**0.5, bits, group, symmetric, dtype) for seed in (1, 2)]
    return [each for weight in pair for each in weight[:3]]


@pytest.mark.parametrize(("design", "tokens"), [("matrix", 1), ("matrix", 17), ("widened", 5)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (4, False)])
def test_kernels_equal_reference(bits, symmetric, dtype, design, tokens, monkeypatch):
    monkeypatch.setattr(packed_swiglu, "TILES", {1 << 62: TILES[design]})
    inputs = weights(21, 160, bits, 32, symmetric, dtype)
    holds(packed_swiglu, random(tokens, 160, dtype=dtype), *inputs, bits, length=160, rounded=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64)])
def test_operation_equals_reference(shape, dtype):
    inputs = weights(16, 64, 4, 64, True, dtype)
    x = random(*shape, dtype=dtype)
    expected = packed_swiglu.reference(x.float(), *inputs, 4)
    actual = packed_swiglu.packed_swiglu(x, *inputs, 4)
    assert actual.dtype == dtype
    # Both products and the gate are rounded, and the gate's argument moves it by as much again.
    largest = expected.abs().max().item() if expected.numel() else 0.0
    summed = 4 * torch.finfo(torch.float32).eps * 64**0.5
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=4 * (torch.finfo(dtype).eps + summed) * largest)


def test_what_is_outside_says_why():
    inputs = weights(16, 64, 4, 64, True, torch.float32)
    x = random(1, 64)
    assert "different shapes" in packed_swiglu.outside(x, *inputs[:3], inputs[3][:8], *inputs[4:], 4)
    assert "zero points" in packed_swiglu.outside(x, *inputs[:2], inputs[0][:2, :1].clone(), *inputs[3:], 4)
