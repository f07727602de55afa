"""Tables of rotary embedding, for runtimes that look angles up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, WeightOp

FUNCTIONS = {"cos": torch.cos, "sin": torch.sin}


def rotary_table(frequencies: Expr, function: str, positions: int, scale: float = 1.0) -> Expr:
    """scale * cos or sin (``function``) of p * frequencies [pairs], for positions p from 0: [positions, pairs]."""
    return apply("rotary_table", [frequencies], {"function": function, "start": 0, "stop": positions, "scale": scale})


def _infer(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (pairs,) = types[0].static_shape
    if attrs["function"] not in FUNCTIONS:
        raise ValueError(f"{attrs['function']} is neither cos nor sin")
    return types[0].with_shape((attrs["stop"] - attrs["start"], pairs))


def _compute(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    places = torch.arange(attrs["start"], attrs["stop"])[:, None].to(tensors[0].dtype)
    return FUNCTIONS[attrs["function"]](places * tensors[0]) * attrs["scale"]


def _take(expr: Expr, axis: int, start: int, stop: int) -> Expr | None:
    if axis:
        return None
    first = expr.attr("start")
    return apply("rotary_table", expr.args, {**dict(expr.attrs), "start": first + start, "stop": first + stop})


OPS = (WeightOp("rotary_table", _infer, _compute, _take),)
