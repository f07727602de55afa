import pytest
import torch

from backends.kernels import token_match
from compiler.ir.ops.tokens import OPS
from tests.kernels.law import DEVICE, DTYPES, holds, random

DEFINED = next(definition for definition in OPS if definition.name == "token_match")
SHAPES = [  # batch, tokens, elements of a metric, tokens that remain, prefix, suffix
    (2, 57, 64, 40, 1, 0),
    (1, 300, 20, 160, 2, 3),
    (3, 6, 100, 3, 0, 0),
    (1, 7, 8, 7, 1, 0),
    (2, 1, 8, 1, 0, 0),
    (2, 3, 8, 3, 1, 2),
    (2, 2, 8, 1, 0, 0),
    (1, 6, 8, 4, 0, 1),
    (0, 8, 8, 5, 0, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, dtype):
    batch, tokens, size, *others = shape
    holds(token_match, random(batch, tokens, size, dtype=dtype), *others, length=size)


@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_operation_of_graphs(shape):
    batch, tokens, size, keep, prefix, suffix = shape
    metric = random(batch, tokens, size)
    expected = DEFINED.eval(metric, keep=keep, prefix=prefix, suffix=suffix)
    for actual, found in zip(token_match.token_match(metric, keep, prefix, suffix), expected, strict=True):
        assert torch.equal(actual, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", [1, 3])
def test_of_equals_the_first_counts(kinds, dtype):
    """Few different metrics with exact cosines: most sources and partners tie, across tiles too."""
    generator = torch.Generator().manual_seed(kinds)
    signs = torch.randint(0, 2, (kinds, 16), generator=generator) * 2.0 - 1
    metric = signs[torch.randint(0, kinds, (2, 280), generator=generator)].to(DEVICE, dtype)
    tile = token_match.Tile(32, 32, 16, 4, 2)
    holds(token_match, metric, 160, 1, 0, length=16, tile=tile)


def test_metrics_of_zeros():
    holds(token_match, torch.zeros(1, 40, 8, device=DEVICE), 25, length=8)


def test_metrics_may_be_parts_of_others():
    metric = random(2, 41, 24)[..., :16]
    holds(token_match, metric, 30, length=16)


@pytest.mark.parametrize(("keep", "prefix", "reason"), [(3, 0, "5 of 8"), (5, 3, "3 of 8"), (9, 0, "-1 of 8")])
def test_what_lies_outside(keep, prefix, reason):
    assert reason in token_match.outside(torch.zeros(1, 8, 4), keep, prefix)
