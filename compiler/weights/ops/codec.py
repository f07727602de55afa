"""What a number system of quantised weights can do, for round-to-nearest and for solvers that choose code by code.

Below, axis 0 of values are the rows of a matrix and their last axis are elements that share parameters: [rows, n] or
[rows, groups, n]. Parameters have the axes of values but the last. Elements may be fewer than a group: a solver
rounds column by column with the parameters it fitted to the whole group.

    codec = codec.for_matrix(matrix)
    parameters = codec.at(0).fit(matrix[:, :64], importance)
    codes = codec.encode(matrix[:, :1], parameters)
    codec.decode(codes, parameters)  # what a loader computes with
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from compiler.weights.expr import Expr

Parameters = tuple[Tensor, ...]
CHUNK_ELEMENTS = 1 << 18
CODES = ("quantize", "fp8_codes", "mx_codes", "nvfp4_codes", "gguf_blocks", "codebook_codes", "ternary_codes")
DEQUANTIZE = (
    "dequantize",
    "dequantize_experts",
    "dequantize_real",
    "dequantize_fp8",
    "dequantize_mx",
    "dequantize_nvfp4",
    "dequantize_gguf",
    "dequantize_codebook",
    "dequantize_stack",
)


class Codec(Protocol):
    """A number system. ``bits`` a code; ``group`` consecutive inputs of a row share parameters (0: all of them)."""

    @property
    def bits(self) -> int: ...

    @property
    def group(self) -> int: ...

    @property
    def by_rows(self) -> bool:
        """Whether the rows of a matrix have nothing in common, so that those of several may make one."""
        ...

    def for_matrix(self, matrix: Tensor, energy: Tensor | None = None) -> Codec:
        """The codec with what all of ``matrix`` [rows, in], or several groups of it, share.

        ``energy`` [in] says how much errors of each column count.
        """
        ...

    def at(self, index: int) -> Codec:
        """The codec of ``for_matrix`` for the group of inputs ``index``."""
        ...

    def reading(self, value: Callable[[Expr], Tensor]) -> Codec:
        """The codec with what several matrices share, which it may hold as an expression."""
        ...

    def nearest(self, weight: Expr) -> Expr:
        """``weight`` [..., out, in] fitted and rounded to nearest. Raises OpError when groups do not divide."""
        ...

    def fit(self, values: Tensor, weights: Tensor | None = None) -> Parameters:
        """Parameters of least squared error, each element's error times its weight (which broadcast to values)."""
        ...

    def encode(self, values: Tensor, parameters: Parameters) -> Tensor:
        """The codes nearest to ``values``, in the dtype that codes have in expressions."""
        ...

    def decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """float32: the values that codes stand for, rounded as the loaders of the format round them."""
        ...

    def rescaled(self, parameters: Parameters, factors: Tensor) -> Parameters:
        """Parameters with scales times ``factors``, one each, rounded to what can be stored."""
        ...

    def stored(self, codes: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
        """The tensors to keep for codes [rows, in] and their parameters [rows, groups]."""
        ...

    def expression(self, parts: Sequence[Expr]) -> Expr:
        """The weight that the expressions of ``stored`` tensors make up."""
        ...


class Alone:
    """What matrices, rows and groups share in a codec whose parameters are a group's own: nothing."""

    @property
    def by_rows(self) -> bool:
        return True

    def for_matrix(self, matrix: Tensor, energy: Tensor | None = None) -> Self:
        return self

    def at(self, index: int) -> Self:
        return self

    def reading(self, value: Callable[[Expr], Tensor]) -> Self:
        return self


def is_quantised(expr: Expr) -> bool:
    """Whether ``expr`` is the value of a quantised weight: codes and their scales."""
    return expr.op in DEQUANTIZE


def rounded_from(expr: Expr) -> Expr | None:
    """The weight that a quantised one was rounded to nearest from; None where codes were chosen otherwise."""
    if not is_quantised(expr) or expr.args[0].op not in CODES:
        return None
    return expr.args[0].args[0]


def code_bits(expr: Expr) -> int:
    """The bits of each code of a quantised weight; of blocks those of signs, of experts of several widths the most."""
    if expr.op in ("dequantize", "dequantize_real", "dequantize_codebook"):
        return expr.attr("bits")
    if expr.op == "dequantize_experts":
        return max(expr.attr("bits"))
    if expr.op == "dequantize_stack":
        return len(expr.args)
    if expr.op == "dequantize_gguf":
        from compiler.weights.ops.gguf.layouts import LAYOUTS

        return LAYOUTS[expr.attr("format")].bits
    if expr.op == "dequantize_mx":
        from compiler.weights.ops.mx import ELEMENTS

        return ELEMENTS[expr.attr("of")].bits
    return 4 if expr.args[0].dtype == torch.uint8 else 8


def row_chunks(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The same rows (indices of axis 0) of all, few enough that float32 temporaries stay in the cache."""
    rows = tensors[0].shape[0]
    step = max(1, CHUNK_ELEMENTS * rows // max(1, tensors[0].numel()))
    for start in range(0, rows, step):
        yield tuple(tensor[start : start + step] for tensor in tensors)


def weighted_squares(error: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of squares along the last axis of ``error``, which is overwritten."""
    error.square_()
    return (error if weights is None else error.mul_(weights)).sum(-1)


def least(candidates: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Of candidates and their errors, both of one shape, element by element the first candidate of least error."""
    pairs = iter(candidates)
    best, error = next(pairs)
    for candidate, other in pairs:
        better = other < error
        best, error = candidate.where(better, best), other.where(better, error)
    return best
