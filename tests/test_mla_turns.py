"""The constant that stands for a rotation: least squares over what it turns."""

from __future__ import annotations

from functools import cache

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from compiler.ir.facts import attention_sites
from passes.gqa_to_mla.source import Source, compressible
from passes.gqa_to_mla.turns import RIDGE, Turns
from tests.test_gqa_to_mla import Decoder

ROTATIONS = {
    "halves": {},
    "interleaved": {"layout": "interleaved"},
    "partly rotated": {"pairs": 3},
    "scaled table": {"table_scale": 1.3},
}


@cache
def source_of(name: str) -> Source:
    found = compressible(attention_sites(Decoder(**ROTATIONS[name]).graph)[0])
    assert isinstance(found, Source)
    return found


def sample(source: Source, seed: int, tokens: int, loud: float, speed: float) -> dict[str, Tensor]:
    """Weights, heads and angles of two heads; every query attends to the first key, which is ``loud``."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(tokens, source.head_dim, generator=generator)
    key[0] *= loud
    weights = torch.rand(2, tokens, tokens, generator=generator).tril().square()
    weights[:, :, 0] += 1
    angles = torch.arange(tokens)[:, None] * speed * torch.rand(source.pairs, generator=generator)
    query = torch.randn(2, tokens, source.head_dim, generator=generator)
    return {"weights": weights, "query": query, "key": key, "angles": angles}


def fitted(source: Source, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The constants [2, pairs] and what they miss."""
    turns = Turns(source)
    scale = float(source.table.attr("scale"))
    table = (scale * seen["angles"].cos(), scale * seen["angles"].sin())
    turns.add(slice(0, 2), seen["weights"], seen["query"], seen["key"], table)
    constants, missed = turns.fitted()
    return torch.view_as_complex(constants)[:2], missed[:2]


def products(source: Source, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """u and r of the definition, complex128 [2, S, T, pairs]."""
    pairs = torch.arange(source.pairs)
    real, imaginary = (2 * pairs, 2 * pairs + 1) if source.interleaved else (pairs, pairs + source.pairs)
    q, k = (torch.complex(h[..., real].double(), h[..., imaginary].double()) for h in (seen["query"], seen["key"]))
    u = q[:, :, None] * k.conj()
    angles = seen["angles"].double()
    turn = torch.polar(torch.ones_like(angles), angles)
    return u, u * (turn[:, None] * turn.conj()) * float(source.table.attr("scale")) ** 2


def missed_by(constant: Tensor, u: Tensor, r: Tensor, weights: Tensor) -> Tensor:
    """The part of the energy of Re(r) that Re(u c) misses, [2, pairs]."""
    off = (u * constant[:, None, None]).real - r.real
    return (weights[..., None] * off.square()).sum((1, 2)) / (weights[..., None] * r.real.square()).sum((1, 2))


@pytest.mark.parametrize("name", ROTATIONS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(3, 12), st.sampled_from([1.0, 9.0]), st.sampled_from([0.01, 0.3, 3.0]))
def test_no_constant_misses_less(name, seed, tokens, loud, speed):
    """Neither those around it nor the mean rotation, which is right only where what is turned does not matter."""
    source = source_of(name)
    seen = sample(source, seed, tokens, loud, speed)
    constant, missed = fitted(source, seen)
    u, r = products(source, seen)
    weights = seen["weights"].double()
    energy = (weights[..., None] * u.abs().square()).sum((1, 2))
    size = energy / (weights[..., None] * r.real.square()).sum((1, 2))
    mean = (weights[..., None] * u.conj() * r).sum((1, 2)) / energy
    rounding = 1e-5 * size  # sums of float32 products of the size of |u|^2
    assert ((missed - missed_by(constant, u, r, weights)).abs() <= rounding).all()
    for other in (mean, *(constant + step for step in (0.3, -0.3, 0.3j, -0.3j))):
        slack = RIDGE * size * (other - mean).abs().square() + rounding
        assert (missed <= missed_by(other, u, r, weights) + slack).all()


@pytest.mark.parametrize("name", ROTATIONS)
def test_what_does_not_turn_needs_no_rotation(name):
    source = source_of(name)
    constant, missed = fitted(source, sample(source, 1, 9, 1.0, 0.0))
    assert (constant - float(source.table.attr("scale")) ** 2).abs().max() <= 1e-5
    assert missed.max() <= 1e-5


@pytest.mark.parametrize("name", ROTATIONS)
def test_heads_without_weight_have_finite_constants(name):
    source = source_of(name)
    seen = sample(source, 1, 9, 1.0, 1.0)
    for constant, missed in (fitted(source, seen | {"weights": 0 * seen["weights"]}), fitted(source, seen)):
        assert torch.isfinite(constant.abs()).all()
        assert torch.isfinite(missed).all()
