import pytest
import torch

from backends.kernels import rms_norm, rms_norm_quantized
from tests.kernels.law import DTYPES, ULPS, random, spoil

STEP = 2.0**-12  # of a code: what another order of a sum may move a quotient by


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 100), (2, 1), (7, 1500), (0, 8)])
def test_codes_are_the_nearest_to_the_norm(shape, added, dtype):
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1) if added else None
    weight = random(shape[-1], dtype=dtype, seed=2)
    inputs = (x, residual, weight, 1e-5)
    plan = rms_norm_quantized.plan(*inputs)
    spoil(plan, inputs)
    codes, scales, total = plan.run()
    torch.testing.assert_close(
        total, rms_norm_quantized.reference(*inputs)[2], rtol=ULPS * torch.finfo(dtype).eps, atol=0
    )
    expected = rms_norm_quantized.reference(total, None, weight, 1e-5)[1]
    torch.testing.assert_close(scales, expected, rtol=1e-5, atol=0)
    exact = rms_norm.reference(total.float(), None, weight.float(), 1e-5)[0] / scales
    assert codes.dtype == torch.int8
    assert ((codes.float() - exact).abs() <= 0.5 + STEP).all()


def test_a_row_of_zeros():
    x = torch.zeros(2, 40, device=random(1).device)
    codes, scales, total = rms_norm_quantized.plan(x, None, random(40), 1e-5).run()
    assert not codes.any() and not total.any()
    assert (scales == rms_norm_quantized.EPSILON).all()


def test_halves_are_rounded_to_even():
    x = torch.tensor([[127.5, 2.5, 3.5, -0.5, -1.5, -127.5]], device=random(1).device)
    weight = torch.full_like(x[0], x.square().mean().sqrt().item())
    codes = rms_norm_quantized.plan(x, None, weight, 0.0).run()[0]
    assert codes.tolist() == [[127, 2, 4, 0, -2, -128]]
    assert torch.equal(codes, rms_norm_quantized.reference(x, None, weight, 0.0)[0])


def test_operation():
    inputs = (random(3, 16), random(3, 16, seed=1), random(16, seed=2), 1e-5)
    codes, *others = rms_norm_quantized.rms_norm_quantized(*inputs)
    expected, *rest = rms_norm_quantized.reference(*inputs)
    torch.testing.assert_close(others, rest)
    assert ((codes.int() - expected.int()).abs() <= 1).all()  # where another order of a sum decides
