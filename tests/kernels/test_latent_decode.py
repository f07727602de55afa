import pytest
import torch

from backends.kernels import latent_decode
from backends.kernels.decoding import Tile
from tests.kernels.caches import rounded
from tests.kernels.law import DEVICE, DTYPES, holds, random

SHAPES = [  # batch, tokens, heads, rank, rotary, keys
    (1, 1, 16, 64, 16, 200),
    (2, 1, 9, 96, 32, 150),
    (1, 3, 5, 100, 0, 40),
    (1, 2, 20, 17, 6, 130),
    (1, 1, 1, 1, 1, 1),
    (0, 1, 4, 32, 8, 10),
]


def inputs_of(batch, tokens, heads, rank, rotary, keys, dtype=torch.float32, bits=16):
    """Queries, caches and the scale of scores."""
    queries = [random(batch, tokens, heads, n, dtype=dtype, seed=n) if n else None for n in (rank, rotary)]
    caches = [random(batch, keys, n, dtype=dtype, seed=n + 1) if n else None for n in (rank, rotary)]
    if bits < 16:
        caches = [None if cache is None else rounded(cache, bits) for cache in caches]
    return (*queries, *caches, (rank + rotary) ** -0.5)


def lengths_of(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, dtype):
    holds(latent_decode, *inputs_of(*shape, dtype=dtype), length=shape[-1], rounded=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounded_caches(shape, bits, dtype):
    inputs = inputs_of(*shape, dtype=dtype, bits=bits)
    holds(latent_decode, *inputs, None, None, None, None, None, bits, length=shape[-1], rounded=True)


def test_reads_what_generated_modules_store():
    latents = random(2, 5, 100)
    for bits in (8, 4):
        stored = rounded(latents, bits)
        step = stored.shape[-1] - latent_decode.row_bytes(100, bits)
        error = (latent_decode.dequantized(stored, 100, bits) - latents).abs().max()
        assert step == 0
        assert error <= latents.abs().max() / (2 ** (bits - 1) - 1)


@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_lengths_windows_and_bent_scores(window, softcap):
    inputs = inputs_of(3, 2, 4, 32, 16, 180)
    holds(latent_decode, *inputs, None, lengths_of(180, 2, 77), None, window, softcap, length=180)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_masks(rows, shared):
    inputs = inputs_of(2, 3, 4, 32, 16, 150)
    mask = random(1 if shared else 2, 1, rows, 150) > 0
    mask[..., :147] &= torch.arange(147, device=DEVICE) > 90  # whole splits of padding
    holds(latent_decode, *inputs, mask, length=150)


def test_a_query_that_sees_nothing_gets_zero():
    inputs = inputs_of(1, 1, 4, 32, 16, 150)
    mask = torch.zeros(1, 1, 1, 150, dtype=torch.bool, device=DEVICE)
    holds(latent_decode, *inputs, mask, length=150)
    assert torch.equal(latent_decode.plan(*inputs, mask).run(), torch.zeros_like(inputs[0]))


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("page", [24, 32])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_pages(bits, page, window):
    q_latent, q_rotary, latents, rotary, scale = inputs_of(2, 1, 4, 70, 20, 4 * page, torch.bfloat16, bits)
    pages = torch.cat((latents, rotary), -1).reshape(8, page, -1)
    split = latents.shape[-1]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).reshape(2, 4).to(DEVICE, torch.int32)
    lengths = lengths_of(4 * page - 1, page + 7)
    inputs = (q_latent, q_rotary, pages[..., :split], pages[..., split:], scale)
    holds(latent_decode, *inputs, None, lengths, order, window, None, bits, length=4 * page, rounded=True)


@pytest.mark.parametrize("tile", [Tile(16, 16, 4, 2, 1), Tile(32, 64, 4, 2, 4)])
def test_every_tile_gives_the_same(tile):
    inputs = inputs_of(1, 2, 20, 48, 16, 300)
    expected = latent_decode.reference(*inputs)
    actual = latent_decode.plan(*inputs, tile=tile).run()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_queries_need_not_be_contiguous():
    q_latent, q_rotary, *rest = inputs_of(2, 3, 4, 32, 16, 80)
    turned = [value.transpose(1, 2).contiguous().transpose(1, 2) for value in (q_latent, q_rotary)]
    holds(latent_decode, *turned, *rest, length=80)


def test_operation_and_gradients():
    q_latent, q_rotary, latents, rotary, scale = inputs_of(2, 3, 4, 32, 16, 80)
    inputs = [q_latent, q_rotary, latents, rotary]
    for value in inputs:
        value.requires_grad_()
    results = [f(*inputs, scale, softcap=2.0) for f in (latent_decode.latent_decode, latent_decode.reference)]
    torch.testing.assert_close(*results)
    actual, expected = (torch.autograd.grad(result.square().sum(), inputs) for result in results)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"latents": torch.zeros(1, 8, 32, dtype=torch.float64)}, "another dtype"),
        ({"latents": torch.zeros(1, 8, 33)}, "not of"),
        ({"bits": 3}, "3 bits"),
        ({"table": torch.zeros(1, 8, dtype=torch.int32)}, "without lengths"),
    ],
)
def test_what_lies_outside(change, reason):
    names = ("q_latent", "q_rotary", "latents", "rotary_keys", "scale")
    inputs = dict(zip(names, inputs_of(1, 1, 4, 32, 16, 8), strict=True))
    assert latent_decode.outside(**inputs) is None
    assert reason in latent_decode.outside(**(inputs | change))
