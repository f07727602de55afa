"""The weights of latent attention that computes what grouped attention computes.

Widths: D input, H query heads, g key/value groups, d query and key head, v value head, of d the first 2p rotated and
n = d - 2p not. The latent of a token is its g values and its g unrotated key parts, r = g (v + n) numbers; the rotary
key is its g rotated key parts, R = 2 g p numbers. Matrices are [rows, inputs]; a bias is a matrix of one input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compiler.weights.expr import Expr
from compiler.weights.ops.basic import cast, concat, expand, eye, full, head_blocks, reshape, scale, slice, transpose

NORM_EPS = 1e-6
SHRINK = 2.0**-30


@dataclass(frozen=True)
class Shape:
    """The widths of one attention; see the module's docstring. ``interleaved`` says how pairs lie in a head."""

    heads: int
    groups: int
    head_dim: int
    value_dim: int
    pairs: int
    interleaved: bool

    @property
    def rotated(self) -> int:
        return 2 * self.pairs

    @property
    def unrotated(self) -> int:
        return self.head_dim - self.rotated

    @property
    def rank(self) -> int:
        return self.groups * (self.value_dim + self.unrotated)

    @property
    def rotary_dim(self) -> int:
        return self.groups * self.rotated

    @property
    def latent_head_dim(self) -> int:
        """The width of a query of latent attention, n + R."""
        return self.unrotated + self.rotary_dim


@dataclass(frozen=True)
class NormConstants:
    """A norm's weight and the factor after it that together undo ``SHRINK`` and the norm, times a gain."""

    weight: float
    factor: float


def norm_constants(dtype: torch.dtype, gain: float = 1.0) -> NormConstants:
    """The pair of numbers of ``dtype`` whose product is nearest to gain * sqrt(eps) / SHRINK.

    rms_norm(SHRINK * c) * weight = c * SHRINK * weight / sqrt(eps), up to a relative (SHRINK * c)^2 / 2 eps, so the
    product must be the inverse of SHRINK / sqrt(eps). That is no number of few bits, but a product of two such
    numbers comes nearer to it than one could: in bfloat16 to 7e-5 (for a gain of 1) instead of 5e-4.
    """
    wanted = torch.tensor(gain * NORM_EPS**0.5 / SHRINK, dtype=torch.float64)
    weights = torch.arange(128, 256, dtype=torch.float64) * 2.0**13
    factors = (wanted / weights).to(dtype)
    best = int((factors.double() * weights / wanted - 1).abs().argmin())
    return NormConstants(float(weights[best]), float(factors[best]))


def kv_down(shape: Shape, key: Expr, value: Expr) -> Expr:
    """Key rows [g*d, X] and value rows [g*v, X] to [r + R, X]: shrunk latent rows, then rotary key rows."""
    heads = reshape(key, (shape.groups, shape.head_dim, key.shape[-1]))
    rotated, passed = _interleaved(shape, heads), slice(heads, 1, shape.rotated, shape.head_dim)
    return concat([scale(value, SHRINK), scale(_rows(passed), SHRINK), _rows(rotated)], 0)


def query_heads(shape: Shape, query: Expr) -> Expr:
    """Query rows [H*d, X] to [H*(n + R), X]: a head's unrotated rows, then its rotated ones in its group's block."""
    heads = reshape(query, (shape.heads, shape.head_dim, query.shape[-1]))
    placed = head_blocks(_interleaved(shape, heads), shape.groups)
    return _rows(concat([slice(heads, 1, shape.rotated, shape.head_dim), placed], 1))


def _interleaved(shape: Shape, heads: Expr) -> Expr:
    """The rotated rows of heads [h, d, X], the two of a pair next to each other: [h, 2p, X]."""
    count, _, width = heads.shape
    rotated = slice(heads, 1, 0, shape.rotated)
    if shape.interleaved:
        return rotated
    halves = reshape(rotated, (count, 2, shape.pairs, width))
    return reshape(transpose(halves, (0, 2, 1, 3)), (count, shape.rotated, width))


def kv_norm(shape: Shape, values: NormConstants, keys: NormConstants, dtype: torch.dtype) -> Expr:
    """The latent norm's weight [r]."""
    per_value = full((shape.groups * shape.value_dim,), values.weight, dtype)
    return concat([per_value, full((shape.groups * shape.unrotated,), keys.weight, dtype)], 0)


def kv_up(shape: Shape, values: NormConstants, keys: NormConstants, dtype: torch.dtype) -> Expr:
    """The up-projection [H*(n + v), r]: every head picks the unrotated key and the value of its group."""
    heads, groups, n, v = shape.heads, shape.groups, shape.unrotated, shape.value_dim
    key_part = _group_columns(heads, groups, n, keys.factor, dtype)
    value_part = _group_columns(heads, groups, v, values.factor, dtype)
    key_rows = concat([full((heads, n, groups * v), 0.0, dtype), key_part], 2)
    value_rows = concat([value_part, full((heads, v, groups * n), 0.0, dtype)], 2)
    return _rows(concat([key_rows, value_rows], 1))


def _group_columns(heads: int, groups: int, width: int, factor: float, dtype: torch.dtype) -> Expr:
    """[H, width, groups*width]: head h has factor * identity in the columns of its group, zeros elsewhere."""
    identity = scale(eye(width, dtype), factor)
    blocks = head_blocks(expand(reshape(identity, (1, width, width)), (heads, width, width)), groups)
    return transpose(blocks, (0, 2, 1))


def query_up(shape: Shape, constants: NormConstants, dtype: torch.dtype) -> Expr:
    """The placement of ``query_heads`` as a matrix [H*(n + R), H*d] that also undoes ``SHRINK``."""
    return query_heads(shape, scale(eye(shape.heads * shape.head_dim, dtype), constants.factor))


def as_column(bias: Expr | None, rows: int, dtype: torch.dtype) -> Expr:
    """A bias [rows], or zeros when there is none, as a matrix of one input."""
    return reshape(full((rows,), 0.0, dtype) if bias is None else cast(bias, dtype), (rows, 1))


def as_vector(column: Expr) -> Expr:
    return reshape(column, (column.shape[0],))


def shrunk(x: Expr) -> Expr:
    return scale(x, SHRINK)


def _rows(heads: Expr) -> Expr:
    """[h, d, X] to [h*d, X]."""
    return reshape(heads, (heads.shape[0] * heads.shape[1], heads.shape[2]))
