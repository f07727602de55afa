"""Learnt tables that a model resizes for the pictures that it gets, such as those of positions.

Of pictures of one size a resized table is a table: it is made once, where others would be read.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compiler.frontend.aten.shared import Handler
from compiler.frontend.params import of_parameter, table
from compiler.ir.graph import Value
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import cast, literal, matmul, reshape, transpose

if TYPE_CHECKING:
    from compiler.frontend.importer import Importer


def _resized(importer: Importer, x: Value, size: Any, corners: bool, scales: Any = None, *, name: str) -> Value:
    """A table [1, C, H, W] at another height and width. What is interpolated is linear in it, one axis at a time."""
    found = of_parameter(x)
    if found is None or not all(isinstance(each, int) for each in importer.out.shape):
        raise importer.fail("to resize what is computed is not in the graph's vocabulary")
    height, width = (int(each) for each in importer.out.shape[2:])
    vertical, horizontal = scales or (None, None)
    across = _matrix(name, int(x.shape[3]), width, corners, horizontal)
    down = _matrix(name, int(x.shape[2]), height, corners, vertical)
    param, stored = found
    return table(importer.graph, param, _last_axis(_last_axis(cast(stored, torch.float32), across), down))


def _last_axis(table: Expr, matrix: Expr) -> Expr:
    """[1, C, H, W] to [1, C, w, H]: the last axis resized by ``matrix`` [W, w], and the last two swapped."""
    rows = reshape(table, (-1, table.shape[-1]))
    resized = reshape(matmul(rows, matrix), (*table.shape[:-1], matrix.shape[1]))
    return transpose(resized)


def _matrix(name: str, before: int, after: int, corners: bool, scale: float | None) -> Expr:
    """float32 [before, after]: what the resizing makes of each unit vector along one axis."""
    size = [after, before] if scale is None else None
    factors = None if scale is None else [scale, 1.0]
    operation = getattr(torch.ops.aten, name).vec
    made: Tensor = operation(torch.eye(before)[None, None], size, corners, factors)
    return literal(made[0, 0].T.flatten().tolist(), (before, after))


HANDLERS: dict[str, Handler] = {
    name: partial(_resized, name=name)
    for name in ("upsample_bicubic2d", "upsample_bilinear2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa")
}
