import pytest
import torch

from backends.kernels import cached_decode
from backends.kernels.decoding import Tile
from tests.kernels.caches import rounded
from tests.kernels.law import DEVICE, DTYPES, holds, random

SHAPES = [  # batch, tokens, heads, key heads, elements of a key and of a value, keys
    (1, 1, 8, 2, 64, 64, 200),
    (2, 3, 6, 2, 80, 80, 70),
    (1, 2, 20, 1, 17, 17, 130),
    (1, 1, 1, 1, 1, 1, 1),
    (0, 1, 4, 2, 32, 32, 10),
]


def inputs_of(batch, tokens, heads, groups, size, value_size, keys, dtype=torch.float32, bits=16):
    """Queries, caches and the scale of scores."""
    query = random(batch, tokens, heads, size, dtype=dtype)
    caches = [random(batch, groups, keys, n, dtype=dtype, seed=i) for i, n in enumerate((size, value_size), 1)]
    return query, *(caches if bits == 16 else [rounded(cache, bits) for cache in caches]), size**-0.5


def lengths_of(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 4, 2, 48, 100, 70)])
def test_equals_reference(shape, dtype):
    holds(cached_decode, *inputs_of(*shape, dtype=dtype), length=shape[-1], rounded=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounded_caches(shape, bits, dtype):
    inputs = inputs_of(*shape, dtype=dtype, bits=bits)
    holds(cached_decode, *inputs, None, None, None, None, None, bits, length=shape[-1], rounded=True)


@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("sunk", [True, False])
def test_lengths_windows_bent_scores_and_sinks(window, softcap, sunk):
    inputs = inputs_of(3, 2, 4, 2, 32, 32, 180)
    sinks = random(4, seed=9) if sunk else None
    holds(cached_decode, *inputs, None, lengths_of(180, 2, 77), window, softcap, sinks, length=180)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_masks(rows, shared):
    inputs = inputs_of(2, 3, 4, 2, 32, 32, 150)
    mask = random(1 if shared else 2, 1, rows, 150) > 0
    mask[..., :147] &= torch.arange(147, device=DEVICE) > 90  # whole splits of padding
    holds(cached_decode, *inputs, mask, length=150)


def test_a_query_that_sees_nothing_gets_zero():
    inputs = inputs_of(1, 1, 4, 2, 32, 32, 150)
    mask = torch.zeros(1, 1, 1, 150, dtype=torch.bool, device=DEVICE)
    for sinks in (None, random(4)):
        results = cached_decode.plan(*inputs, mask, sinks=sinks).run(), cached_decode.cached_decode(*inputs, mask)
        assert all(torch.equal(result, torch.zeros_like(inputs[0])) for result in results)


@pytest.mark.parametrize("tile", [Tile(16, 16, 4, 2, 1), Tile(32, 64, 4, 2, 4)])
def test_every_tile_gives_the_same(tile):
    holds(cached_decode, *inputs_of(1, 5, 8, 1, 48, 48, 150), length=150, tile=tile)


def test_caches_need_not_be_contiguous():
    query, keys, values, scale = inputs_of(2, 3, 4, 2, 32, 32, 80)
    keys, values = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (keys, values))
    holds(cached_decode, query.transpose(1, 2).contiguous().transpose(1, 2), keys, values, scale, length=80)


@pytest.mark.parametrize("others", [{}, {"window": 20}, {"softcap": 2.0}])
def test_operation_and_gradients(others):
    query, keys, values, scale = inputs_of(2, 3, 4, 2, 32, 32, 80)
    inputs = [query, keys, values]
    for value in inputs:
        value.requires_grad_()
    results = [f(*inputs, scale, **others) for f in (cached_decode.cached_decode, cached_decode.reference)]
    torch.testing.assert_close(*results)
    actual, expected = (torch.autograd.grad(result.square().sum(), inputs) for result in results)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"values": torch.zeros(1, 2, 8, 32, dtype=torch.float64)}, "another dtype"),
        ({"bits": 8, "keys": torch.zeros(1, 2, 8, 3).byte(), "values": torch.zeros(1, 2, 8, 3).byte()}, "not of"),
        ({"bits": 3}, "3 bits"),
    ],
)
def test_what_lies_outside(change, reason):
    inputs = dict(zip(("query", "keys", "values", "scale"), inputs_of(1, 1, 4, 2, 32, 32, 8), strict=True))
    assert cached_decode.outside(**inputs) is None
    assert reason in cached_decode.outside(**(inputs | change))
