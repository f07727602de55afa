import pytest
import torch

from backends.kernels import token_match, token_merge
from compiler.ir.ops.tokens import OPS
from tests.kernels.law import DEVICE, DTYPES, holds, random

DEFINED = next(definition for definition in OPS if definition.name == "token_merge")


def inputs_of(batch, tokens, size, keep, dtype=torch.float32):
    """Tokens, weights, and what is merged into what."""
    weight = torch.randint(1, 9, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    return random(batch, tokens, size, dtype=dtype), weight, *token_match.reference(random(batch, tokens, 8), keep)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 40, 100, 21), (1, 9, 1, 5), (3, 4, 33, 4), (0, 8, 16, 5), (1, 1, 8, 1)])
def test_equals_reference(shape, dtype):
    inputs = inputs_of(*shape, dtype=dtype)
    holds(token_merge, *inputs, length=20)


def test_all_into_one():
    x, weight, index, rest, _ = inputs_of(2, 60, 40, 31)
    holds(token_merge, x, weight, index, rest, torch.full_like(rest, 30), length=30)


def test_is_the_operation_of_graphs():
    inputs = inputs_of(2, 40, 16, 25)
    torch.testing.assert_close(token_merge.token_merge(*inputs), DEFINED.eval(*inputs))


def test_what_is_merged_keeps_the_weighted_sum():
    x, weight, *places = inputs_of(2, 40, 16, 25)
    merged, totals = token_merge.plan(x, weight, *places).run()
    torch.testing.assert_close(totals.sum(1), weight.sum(1))
    torch.testing.assert_close(
        (merged * totals[..., None]).sum(1), (x * weight[..., None]).sum(1), rtol=1e-5, atol=1e-4
    )


def test_gradients_are_those_of_the_reference():
    x, weight, *places = inputs_of(2, 12, 16, 8)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    results = [f(*inputs, *places)[0].square().sum() for f in (token_merge.token_merge, token_merge.reference)]
    actual, expected = (torch.autograd.grad(result, inputs) for result in results)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
