"""Number systems as solvers use them: group by group they give what the expressions of a whole matrix give."""

from __future__ import annotations

import pytest
import torch

from compiler.weights.evaluate import evaluate
from compiler.weights.ops.codec import Codec
from compiler.weights.ops.integer import Integer
from compiler.weights.ops.quant import quantise
from tests.test_packing import bound

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [(bits, group, symmetric) for bits in (2, 4, 8) for group in (0, 16) for symmetric in (True, False)]
POWERS = [2.0, 0.7]


def matrix(dtype: torch.dtype, rows: int = 24, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_group(codec: Codec, weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors to store when each group is fitted by itself and its columns are rounded one by one."""
    codec, width = codec.for_matrix(weight), codec.group or weight.shape[1]
    codes, fitted = [], []
    for columns in weight.float().split(width, 1):
        parameters = codec.fit(columns)
        codes += [codec.encode(column, parameters) for column in columns.split(1, 1)]
        fitted.append(parameters)
    return list(codec.stored(torch.cat(codes, 1), tuple(torch.stack(p, 1) for p in zip(*fitted, strict=True))))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("bits", "group", "symmetric"), INTEGERS)
@pytest.mark.parametrize("power", POWERS)
def test_integers_by_column_are_those_of_the_whole(bits, group, symmetric, dtype, power):
    weight = matrix(dtype)
    codec = Integer(bits, group, dtype, symmetric, power=power)
    parts = by_group(codec, weight)
    (expr,), sources = bound(w=weight)
    value = quantise(expr, bits, group, symmetric=symmetric, power=power, scale_dtype=dtype)
    for ours, whole in zip(parts, evaluate(list(value.args), sources), strict=True):
        assert ours.dtype == whole.dtype and torch.equal(ours, whole)
    exprs, stored = bound(**{f"p{index}": part for index, part in enumerate(parts)})
    assert codec.expression(exprs).attrs == value.attrs
    assert torch.equal(evaluate([codec.expression(exprs)], stored)[0], evaluate([value], sources)[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("bits", "group", "symmetric"), INTEGERS)
def test_integers_decode_to_what_is_stored(bits, group, symmetric, dtype):
    weight = matrix(dtype, columns=16)
    codec = Integer(bits, 16, dtype, symmetric)
    parameters = codec.fit(weight.float())
    codes = codec.encode(weight.float(), parameters)
    parts = codec.stored(codes, tuple(parameter.unsqueeze(1) for parameter in parameters))
    exprs, stored = bound(**{f"p{index}": part for index, part in enumerate(parts)})
    assert torch.equal(evaluate([codec.expression(exprs)], stored)[0].float(), codec.decode(codes, parameters))


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_go_by_small_errors_have_the_least_sum_of_those_and_gain_with_bits(symmetric):
    weight = matrix(torch.float32) * torch.linspace(0.1, 3, 64).exp()

    def total(bits, power):
        codec = Integer(bits, 16, torch.float32, symmetric, power=power)
        parameters = codec.fit(weight.unflatten(-1, (-1, 16)))
        found = codec.decode(codec.encode(weight.unflatten(-1, (-1, 16)), parameters), parameters)
        return float((found - weight.unflatten(-1, (-1, 16))).abs().pow(0.7).sum())

    sums = [total(bits, 0.7) for bits in (2, 3, 4)]
    assert sums == sorted(sums, reverse=True)
    assert all(robust < total(bits, 2.0) for robust, bits in zip(sums, (2, 3, 4), strict=True))


def test_scales_that_go_by_small_errors_let_an_outlier_err():
    values = (torch.randint(-3, 4, (4, 32), generator=torch.Generator().manual_seed(0)) / 4).float()
    values[:, 0], values[:, 5] = -0.75, 2.0
    codec = Integer(3, 32, torch.float32, power=0.7)
    parameters = codec.fit(values)
    off = codec.decode(codec.encode(values, parameters), parameters) - values
    assert int((off.abs() > 1e-6).sum()) <= 4


@pytest.mark.parametrize("bits", range(2, 8))
def test_a_weight_and_its_negative_are_rounded_alike_without_zero_points(bits):
    """So the largest number of a group has the code that only one sign has, whichever sign is its own."""
    weight = matrix(torch.float32)
    found = []
    for values in (weight, -weight):
        codec = Integer(bits, 16, torch.float32)
        parameters = codec.fit(values.unflatten(-1, (-1, 16)))
        found.append((codec.encode(values.unflatten(-1, (-1, 16)), parameters), parameters[0]))
    (codes, scale), (negative_codes, negative_scale) = found
    assert torch.equal(codes, negative_codes) and torch.equal(scale, -negative_scale)
    assert set(scale.sign().unique().tolist()) == {-1.0, 1.0}
    largest = weight.unflatten(-1, (-1, 16)).abs().argmax(-1, keepdim=True)
    assert (codes.gather(-1, largest) < 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_eight_bits_and_of_zero_points_are_positive(symmetric):
    codec = Integer(8 if symmetric else 4, 16, torch.float32, symmetric)
    assert (codec.fit(matrix(torch.float32).unflatten(-1, (-1, 16)))[0] > 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_weighs_nothing_is_clipped_for_what_weighs(symmetric):
    """An outlier without weight costs the other elements no accuracy."""
    values = torch.linspace(-1, 1, 33)[None, :32].clone()
    values[0, 5] = 1.6
    weights = torch.ones(32)
    weights[5] = 0.0
    codec = Integer(3, 32, torch.float32, symmetric)
    errors = []
    for importance in (None, weights):
        parameters = codec.fit(values, importance)
        error = codec.decode(codec.encode(values, parameters), parameters) - values
        errors.append(float((error.square() * weights).sum()))
    assert errors[1] < errors[0]
