import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.kernels import bf16_codec as codec
from tests.kernels.law import DEVICE, random


def equal(one, other):
    return one.shape == other.shape and torch.equal(one.view(torch.int16), other.view(torch.int16))


def bits(values):
    return torch.tensor(values, dtype=torch.int16).view(torch.bfloat16)


def launched(weight):
    """What the launches write over bits that are all set."""
    plan = codec.plan(*(part.to(DEVICE) for part in codec.encode(weight)))
    plan.result.view(torch.int16).fill_(-1)
    return plan.run().cpu()


EVERY = bits(range(-(2**15), 2**15))
SHAPES = {"none": (0,), "one": (1,), "odd": (3, 77), "a block": (2, 1024), "several": (5, 1001)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_survive(shape):
    weight = (random(*shape) * 0.02).bfloat16().cpu()
    assert equal(codec.bf16_codec(*codec.encode(weight)), weight)
    assert equal(launched(weight), weight)


def test_every_number_survives():
    """Denormals, infinities, NaNs and both zeros, in an order in which most exponents escape."""
    mixed = EVERY[torch.randperm(len(EVERY), generator=torch.Generator().manual_seed(0))]
    assert equal(codec.reference(*codec.encode(mixed)), mixed)
    assert equal(codec.reference(*codec.encode(EVERY)), EVERY)
    assert equal(launched(mixed[:9000]), mixed[:9000])


def test_blocks_beyond_one_piece_survive(monkeypatch):
    monkeypatch.setattr(codec, "PIECE", 3)
    weight = bits(range(3 * codec.BLOCK + 5000))
    assert equal(codec.reference(*codec.encode(weight)), weight)


@given(st.lists(st.integers(-(2**15), 2**15 - 1), max_size=70), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_any_bits_survive(values, times):
    weight = bits(values * times)
    assert equal(codec.reference(*codec.encode(weight)), weight)


@pytest.mark.parametrize("deviation", [1e-3, 0.02, 0.5])
def test_normal_weights_take_close_to_their_entropy(deviation):
    weight = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * deviation).bfloat16()
    counts = torch.bincount(weight.view(torch.int16).int() >> 7 & 0xFF, minlength=256)
    share = counts[counts > 0] / weight.numel()
    bound = weight.numel() / 8 * (8 - (share * share.log2()).sum().item())
    assert bound < codec.encode(weight).size < 1.02 * bound
