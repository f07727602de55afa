"""Quantised codes and their packing: laws, and equality with compressed-tensors' own functions."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.errors import OpError
from compiler.ir.types import TensorType
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import Expr, load
from compiler.weights.ops import take
from compiler.weights.ops.quant import code_range, pack_bits, quantise
from compiler.weights.source import MemorySource

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def bound(**tensors: torch.Tensor) -> tuple[list[Expr], dict[str, MemorySource]]:
    exprs = [load("model", name, TensorType(t.dtype, tuple(t.shape))) for name, t in tensors.items()]
    return exprs, {"model": MemorySource(tensors)}


def rounded(weight: torch.Tensor, bits: int, group: int, **options) -> torch.Tensor:
    (expr,), sources = bound(w=weight)
    options.setdefault("scale_dtype", weight.dtype)
    return evaluate([quantise(expr, bits, group, **options)], sources)[0]


def squared_error(weight: torch.Tensor, bits: int, group: int, **options) -> float:
    """Summed over the weight, in exact arithmetic on the codes, scales and zero points."""
    (expr,), sources = bound(w=weight)
    parts = evaluate(list(quantise(expr, bits, group, scale_dtype=weight.dtype, **options).args), sources)
    codes, scale = parts[0].double(), parts[1].double().unsqueeze(-1)
    zero = parts[2].double().unsqueeze(-1) if len(parts) > 2 else 0.0
    grouped = (*weight.shape[:-1], parts[1].shape[-1], -1)
    return float(((codes.reshape(grouped) - zero) * scale - weight.double().reshape(grouped)).square().sum())


@st.composite
def weights(draw, dtype=FLOATS):
    """Small matrices of normal values, of small integers (where coarse grids are exact) or of mostly zeros."""
    groups, group, rows = draw(st.integers(1, 3)), draw(st.sampled_from([4, 8, 32])), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = torch.randn(rows, groups * group, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    kind = draw(st.sampled_from(["normal", "integers", "sparse", "positive", "negative"]))
    if kind == "integers":
        values = torch.randint(-9, 10, values.shape, generator=generator).float() / 4
    elif kind == "sparse":
        values = values * (torch.rand(values.shape, generator=generator) < 0.1)
    elif kind != "normal":
        values = values.abs() if kind == "positive" else -values.abs()
    return values.to(draw(dtype) if isinstance(dtype, st.SearchStrategy) else dtype), group


@given(st.integers(2, 8), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_packing_equals_the_library(bits, rows, columns, seed):
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    (expr,), sources = bound(c=codes)
    by_column, by_row = evaluate([pack_bits(expr, bits), pack_bits(expr, bits, axis=-2)], sources)
    assert torch.equal(by_column, pack_to_int32(codes, bits))
    assert torch.equal(by_row, pack_to_int32(codes, bits, packed_dim=0))


def test_experts_are_packed_slice_by_slice():
    codes = torch.randint(-8, 8, (3, 5, 24), dtype=torch.int8)
    (expr,), sources = bound(c=codes)
    assert torch.equal(evaluate([pack_bits(expr, 4)], sources)[0], pack_to_int32(codes, 4))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 0), (3, 32), (8, 32), (8, 0), (5, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_values_equal_the_library(bits, group, symmetric, dtype):
    """On our scales and zero points, compressed-tensors computes our codes, our bytes and our values."""
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(bits)).to(dtype)
    (expr,), sources = bound(w=weight)
    value = quantise(expr, bits, group, symmetric=symmetric, scale_dtype=dtype)
    codes, scale, *zero = value.args
    tensors = evaluate([pack_bits(codes, bits), scale, value, *zero], sources)
    packed, scales, dense = tensors[:3]
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, dynamic=False, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = {"weight": weight.float(), "weight_scale": scales.float()}
    if zero:
        theirs["weight_zero_point"] = tensors[3]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    compressed = compressor.compress(theirs, scheme)
    assert torch.equal(compressed["weight_packed"], packed)
    ours = dict(compressed, weight_scale=scales)
    if zero:
        ours["weight_zero_point"] = evaluate([pack_bits(zero[0], bits, axis=-2)], sources)[0]
        assert torch.equal(compressed["weight_zero_point"], ours["weight_zero_point"])
    assert torch.equal(compressor.decompress(ours, scheme)["weight"], dense)


@given(weights(), st.integers(2, 8), st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_values_are_finite_and_near(made, bits, symmetric, search):
    """Without clipping no value is further off than half a step, plus the rounding of scale and product."""
    weight, group = made
    value = rounded(weight, bits, group, symmetric=symmetric, search=search)
    assert value.isfinite().all() and value.dtype == weight.dtype
    grouped = weight.float().reshape(weight.shape[0], -1, group)
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    span = torch.maximum(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
    error = (value.float().reshape(grouped.shape) - grouped).abs()
    rounding = 4 * torch.finfo(weight.dtype).eps * torch.maximum(-low, high) + torch.finfo(weight.dtype).tiny
    steps = 0.5 if symmetric else 1.0
    if not search:
        assert (error <= steps * span * (1 + 1e-5) + rounding * (1 if symmetric else 2)).all()


@given(weights(dtype=st.sampled_from([torch.float32, torch.bfloat16])), st.integers(2, 7), st.booleans())
@settings(max_examples=150, deadline=None)
def test_more_bits_never_increase_the_error(made, bits, symmetric):
    """Of 7 bits and 8 the scales may differ in sign, and so in which end has a code more."""
    weight, group = made
    bits = min(bits, 6) if symmetric else bits
    coarse = squared_error(weight, bits, group, symmetric=symmetric, search=True)
    fine = squared_error(weight, bits + 1, group, symmetric=symmetric, search=True)
    assert fine <= coarse * (1 + 1e-5) + 1e-12 * float(weight.double().square().sum())


@given(weights(), st.integers(2, 8), st.booleans())
@settings(max_examples=80, deadline=None)
def test_searching_never_increases_the_error(made, bits, symmetric):
    weight, group = made
    plain = squared_error(weight, bits, group, symmetric=symmetric, search=False)
    searched = squared_error(weight, bits, group, symmetric=symmetric, search=True)
    assert searched <= plain * (1 + 1e-5) + 1e-12 * float(weight.double().square().sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_and_one_repeated_value_are_exact(bits, symmetric, dtype):
    """The blocks of an exact up-projection: zeros, and one constant wherever a head has its own latent."""
    block = torch.zeros(16, 64)
    block[:, 8:24] = torch.eye(16) * 1.024
    block[3] = 0.0
    for weight in (block.to(dtype), -block.to(dtype)):
        assert torch.equal(rounded(weight, bits, 16, symmetric=symmetric), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_scaled_by_tiny_numbers_quantise_like_the_others(symmetric):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tiny = (weight.float() * 2.0**-30).to(torch.bfloat16)
    whole = rounded(weight, 4, 32, symmetric=symmetric).float()
    assert torch.equal(rounded(tiny, 4, 32, symmetric=symmetric).float(), whole * 2.0**-30)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_of_rows_is_computed_from_those_rows(symmetric):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    (expr,), sources = bound(w=weight)
    value = quantise(expr, 4, 32, symmetric=symmetric, scale_dtype=torch.float32)
    for whole in (value, pack_bits(value.args[0], 4), *value.args):
        part = take(whole, 0, 8, 24)
        assert torch.equal(evaluate([part], sources)[0], evaluate([whole], sources)[0][8:24])


def test_a_group_that_does_not_divide_is_an_error():
    (expr,), _ = bound(w=torch.zeros(4, 48))
    with pytest.raises(OpError, match="groups of 32 do not divide 48 inputs"):
        quantise(expr, 4, 32, scale_dtype=torch.float32)
