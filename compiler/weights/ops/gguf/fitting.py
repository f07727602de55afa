"""Scales and minima of parts by weighted least squares: x ~ s * q - m with q within a range of integers.

Candidates cover the part's range with more or fewer steps; each is rounded, and s and m are then those of least squared
error for these codes, rounded once more. Everything here is float32 [..., n] for values, [...] for scales.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compiler.weights.ops.gguf.layout import Layout

STEPS = tuple(0.55 + 0.05 * step for step in range(12))  # of the range that codes cover, in that of the values
FEW_STEPS = (*STEPS, 0.25, 0.35, 0.45)  # where codes are few, clipping pays
MANY_STEPS = (0.98, 0.96, 0.93, 0.9)  # where they are many, it hardly does
FEW_CODES, MANY_CODES = 8, 32
TURNS = 2  # of least squares and rounding for each candidate


def fitted(values: Tensor, weights: Tensor, layout: Layout, *, search: bool) -> tuple[Tensor, Tensor]:
    """s and m of every part; without ``search`` those that clip nothing. ``weights`` broadcast to ``values``."""
    starts = _with_least(values, layout) if layout.most else _symmetric(values, layout)
    if not search:
        return next(iter(starts))
    best: tuple[Tensor, Tensor] | None = None
    error = torch.full(values.shape[:-1], torch.inf)
    for scale, least in starts:
        for _ in range(TURNS):
            codes = rounded(values, scale, least, layout)
            scale, least = refit(values, weights, codes, layout)
            own = squared_error(values, weights, scale, least, layout)
            better = own < error
            best = (scale, least) if best is None else (scale.where(better, best[0]), least.where(better, best[1]))
            error = own.where(better, error)
    assert best is not None  # there are candidates
    return best


def rounded(values: Tensor, scale: Tensor, least: Tensor, layout: Layout) -> Tensor:
    """The nearest codes, as floats; 0, or what is nearest to it, where the scale is 0."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return ((values + least.unsqueeze(-1)) * inverse.unsqueeze(-1)).round_().clamp_(*layout.codes)


def squared_error(values: Tensor, weights: Tensor, scale: Tensor, least: Tensor, layout: Layout) -> Tensor:
    """The weighted squared error of rounding to these parameters."""
    codes = rounded(values, scale, least, layout)
    error = codes.mul_(scale.unsqueeze(-1)).sub_(least.unsqueeze(-1)).sub_(values)
    return error.square_().mul_(weights).sum(-1)


def refit(values: Tensor, weights: Tensor, codes: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """s and m of least squared error for ``codes``."""
    cross = (weights * codes * values).sum(-1)
    squares = (weights * codes.square()).sum(-1)
    alone = cross / squares.clamp(min=torch.finfo(torch.float32).tiny)
    if not layout.most:
        return alone, torch.zeros_like(alone)
    total, first = weights.expand(values.shape).sum(-1), (weights * codes).sum(-1)
    mean = (weights * values).sum(-1)
    determinant = total * squares - first.square()
    regular = determinant > 1e-6 * total * squares
    divisor = determinant.where(regular, 1.0)
    scale = ((total * cross - first * mean) / divisor).where(regular, alone)
    least = ((first * cross - squares * mean) / divisor).where(regular, 0.0)
    if layout.signed:
        return scale, least
    return scale.where(least > 0, alone).clamp(min=0.0), least.clamp(min=0.0)


def _symmetric(values: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
    """The value of largest magnitude on the outermost code, on either side, and beyond it."""
    place = values.abs().argmax(-1, keepdim=True)
    extreme = values.gather(-1, place).squeeze(-1)
    low, high = layout.codes
    none = torch.zeros_like(extreme)
    for step in (1.0, *_steps(layout)):
        yield extreme / low * step, none
        if high > 1 or low != -high:
            yield extreme / high * step, none


def _with_least(values: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
    low = values.amin(-1) if layout.signed else values.amin(-1).clamp(max=0.0)
    high = values.amax(-1) if layout.signed else torch.maximum(values.amax(-1), low)
    span = high - low
    for step in (1.0, *_steps(layout)):
        yield span / layout.codes[1] * step, -low
        if step < 1:
            yield span / layout.codes[1] * step, -low - span * (1 - step) / 2


def _steps(layout: Layout) -> tuple[float, ...]:
    codes = layout.codes[1] - layout.codes[0]
    return FEW_STEPS if codes < FEW_CODES else MANY_STEPS if codes > MANY_CODES else STEPS
