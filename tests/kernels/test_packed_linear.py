import pytest
import torch

from backends.kernels import packed_linear
from compiler.weights.evaluate import evaluate
from compiler.weights.ops.quant import pack_bits, quantise
from tests.kernels.law import DEVICE, DTYPES, random
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
@pytest.mark.parametrize(("rows", "width", "group"), [(5, 96, 32), (33, 64, 64), (1, 100, 0), (7, 120, 40)])
def test_weights_are_what_was_packed(bits, symmetric, rows, width, group):
    words, scales, zeros, dense = packed(random(rows, width), bits, group, symmetric)
    torch.testing.assert_close(packed_linear.dense(words, scales, zeros, bits, width), dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_operation_equals_reference(bits, dtype):
    words, scales, zeros, _ = packed(random(24, 192), bits, 64, bits % 2, dtype)
    for shape in [(192,), (1, 192), (2, 3, 192), (40, 192), (0, 192)]:
        x = random(*shape, dtype=dtype)
        expected = packed_linear.reference(x.float(), words, scales, zeros, bits)
        actual = packed_linear.packed_linear(x, words, scales, zeros, bits)
        assert actual.dtype == dtype and actual.shape == expected.shape
        bound = 2 * torch.finfo(dtype).eps * (expected.abs().max().item() if expected.numel() else 0.0)
        torch.testing.assert_close(actual.float(), expected, rtol=0, atol=bound)


def test_gradients_are_those_of_the_reference():
    words, scales, zeros, dense = packed(random(24, 64), 4, 32, False)
    x = random(3, 64).requires_grad_()
    (found,) = torch.autograd.grad(packed_linear.packed_linear(x, words, scales, zeros, 4).square().sum(), x)
    (expected,) = torch.autograd.grad((x @ dense.T).square().sum(), x)
    torch.testing.assert_close(found, expected)
