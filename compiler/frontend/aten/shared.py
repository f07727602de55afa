"""What the import tables share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compiler.ir.graph import Value
from compiler.ir.types import Shape

if TYPE_CHECKING:
    from compiler.frontend.importer import Importer

Handler = Callable[..., Any]
"""Takes the importer, then the ATen operation's own arguments: tensors as values, symbolic sizes as dims."""


class Complex(NamedTuple):
    """A complex tensor, which a graph holds as two real ones."""

    real: Value
    imaginary: Value


class Masking(NamedTuple):
    """A padding mask, or none, with the window (0 for none) and the causality of the attentions that it is made for."""

    mask: Value | None
    window: int
    causal: bool


def as_dtype(importer: Importer, x: Value, dtype: torch.dtype) -> Value:
    """``x`` in ``dtype``, cast if need be."""
    return x if x.type.dtype == dtype else importer.emit("cast", x, dtype=dtype)


def number(importer: Importer, value: Any) -> float:
    """A scalar operand. Raises CaptureError for a symbolic one."""
    if isinstance(value, str):
        raise importer.fail(f"arithmetic with the size {value} of an input is not in the graph's vocabulary")
    return float(value)


def axis_of(x: Value, axis: int) -> int:
    """An axis counted from the front."""
    return axis % max(1, x.type.rank)


def last_axis(x: Value, axis: int) -> int:
    """An axis, written -1 when it is the last."""
    return -1 if axis_of(x, axis) == x.type.rank - 1 else axis_of(x, axis)


def reshaped(importer: Importer, x: Value, shape: Shape) -> Value:
    """``x`` viewed in ``shape``."""
    return x if x.shape == shape else importer.emit("reshape", x, shape=shape)


def expanded(importer: Importer, x: Value, shape: Shape) -> Value:
    """``x`` broadcast to ``shape``."""
    return x if x.shape == shape else importer.emit("expand", x, shape=shape)
