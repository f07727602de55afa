import pytest
import torch

from backends.kernels import kept, packed_linear, packed_weight
from backends.kernels.packed_linear import Tile
from compiler.weights.evaluate import evaluate
from compiler.weights.ops.quant import pack_bits, quantise
from tests.kernels.law import DEVICE, DTYPES, holds, random
from tests.test_packing import bound

BITS = range(2, 9)


def packed(weight, bits, group, symmetric, scale_dtype=torch.float32):
    """Words, scales and zero points of ``weight`` [N, K], and the weight that they stand for."""
    (expr,), sources = bound(w=weight.cpu())
    value = quantise(expr, bits, group, symmetric=symmetric, scale_dtype=scale_dtype)
    codes, scales, *zero = value.args
    wanted = [pack_bits(codes, bits), scales, *(pack_bits(each, bits, axis=-2) for each in zero), value]
    words, scales, *zeros, dense = (found.to(DEVICE) for found in evaluate(wanted, sources))
    return words, scales, zeros[0] if zeros else None, dense


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "group"), [(5, 96, 32), (33, 64, 64), (1, 100, 0), (7, 120, 40), (3, 96, 32)]
)
def test_weights_are_what_was_packed(bits, symmetric, rows, width, group):
    words, scales, zeros, dense = packed(random(rows, width), bits, group, symmetric)
    torch.testing.assert_close(packed_weight.dense(words, scales, zeros, bits, width), dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 64, 40])
@pytest.mark.parametrize("bits", BITS)
def test_operation_equals_reference(bits, group, symmetric, dtype):
    width = 3 * group or 320
    words, scales, zeros, _ = packed(random(24, width), bits, group, symmetric, dtype)
    for shape in [(width,), (1, width), (2, 3, width), (70, width), (0, width)]:
        x = random(*shape, dtype=dtype)
        expected = packed_linear.reference(x.float(), words, scales, zeros, bits)
        actual = packed_linear.packed_linear(x, words, scales, zeros, bits)
        assert actual.dtype == dtype and actual.shape == expected.shape
        summed = 4 * torch.finfo(torch.float32).eps * width**0.5
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(
            actual.float(), expected, rtol=0, atol=(2 * torch.finfo(dtype).eps + summed) * largest
        )


TILES = {
    "matrix": Tile("matrix", 16, 16, 1, 4, 2, splits=3),
    "whole": Tile("matrix", 16, 32, 2, 4, 2, splits=1),
    "widened": Tile("widened", 1, 8, 2, 4, 1),
}


@pytest.mark.parametrize(("design", "tokens"), [("matrix", 1), ("matrix", 17), ("whole", 3), ("widened", 5)])
@pytest.mark.parametrize(
    ("bits", "symmetric"), [(2, True), (3, False), (3, True), (4, False), (4, True), (5, False), (8, False)]
)
def test_kernels_equal_reference(bits, symmetric, design, tokens, monkeypatch):
    monkeypatch.setattr(packed_linear, "TILES", {1 << 62: TILES[design]})
    for place, (rows, width, group) in enumerate([(37, 160, 32), (6, 128, 64)]):
        dtype = DTYPES[(bits + tokens + place) % 3]
        words, scales, zeros, _ = packed(random(rows, width), bits, group, symmetric, dtype)
        x = random(tokens, width, dtype=dtype)
        holds(packed_linear, x, words, scales, zeros, bits, length=width, rounded=design == "widened")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 4, 96), (0, 96), (5, 96)])
def test_plans_equal_reference(shape, dtype):
    words, scales, zeros, _ = packed(random(9, 96), 4, 0, False)
    holds(packed_linear, random(*shape, dtype=dtype), words, scales, zeros, 4, length=96, rounded=True)


def test_what_is_outside_says_why():
    words, scales, zeros, _ = packed(random(9, 80), 4, 40, True)
    assert "not of a multiple of 32" in packed_linear.outside(random(1, 80), words, scales, zeros, 4)


def test_gradients_are_those_of_the_reference():
    words, scales, zeros, dense = packed(random(24, 64), 4, 32, False)
    x, above = random(3, 64).requires_grad_(), random(3, 24)
    (found,) = torch.autograd.grad(packed_linear.packed_linear(x, words, scales, zeros, 4), x, above)
    torch.testing.assert_close(found, above @ dense)


def test_what_a_cpu_keeps_follows_its_tensors():
    """Codes that are written over, scales of another dtype and slices of one tensor are each computed with."""
    one, other = (packed(random(24, 64, seed=seed), 4, 32, True) for seed in (1, 2))
    words, scales = torch.stack([one[0], other[0]]), torch.stack([one[1], other[1]])
    x = random(2, 64)

    def equal(words, scales):
        expected = packed_linear.reference(x, words, scales, None, 4)
        torch.testing.assert_close(packed_linear.packed_linear(x, words, scales, None, 4), expected)

    for expert in (0, 1, 0):
        equal(words[expert], scales[expert])
    words[0] = words[1].clone()
    equal(words[0], scales[0])
    equal(words[0], scales[1])
    equal(words[0], scales[0].bfloat16())
    scales.data.mul_(2)
    equal(words[0], scales[0])
    words.data = words.data.flip(1).contiguous()
    equal(words[0], scales[0])
    with torch.inference_mode():
        inside = words[1].clone()
        equal(inside, scales[1])
        inside.add_(1)
        equal(inside, scales[1])


@pytest.mark.skipif(DEVICE != "cpu", reason="what CPUs keep")
def test_parts_are_noticed_that_are_written_without_gradients_but_not_through_data():
    """No count tells of the second, and to read a whole weight at every call would take as long as the call."""
    words, scales, _, _ = packed(random(24, 64), 4, 32, False)
    x = random(2, 64)

    def follows() -> bool:
        expected = packed_linear.reference(x, words, scales, None, 4)
        return torch.allclose(packed_linear.packed_linear(x, words, scales, None, 4), expected, rtol=1e-4, atol=1e-4)

    assert follows()
    words.data[5] = words[6].clone()
    assert not follows()
    with torch.no_grad():
        words[5] = words[7]
    assert follows()


@pytest.mark.skipif(DEVICE != "cpu", reason="what CPUs keep")
def test_a_cpu_keeps_nothing_longer_than_the_words():
    before = len(kept._KEPT)
    words, scales, zeros, _ = packed(random(24, 64), 4, 32, False)
    packed_linear.packed_linear(random(1, 64), words, scales, zeros, 4)
    assert len(kept._KEPT) == before + 1
    del words
    assert len(kept._KEPT) == before
