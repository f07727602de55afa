"""The orthogonal transform of an axis that spreads what stands out in it, for widths that are no powers of two too.

Of n = m p, p the largest power of two in n, it is the Kronecker product of a cosine transform [m, m] and a Hadamard
matrix [p, p] over its root: n (m + log2 p) additions for each vector, and no stored matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compiler.ir.opdef import OpDef, Types
from compiler.ir.ops.elementwise import need
from compiler.ir.types import TensorType


def transform(x: Tensor) -> Tensor:
    """x [..., n] times ``basis(n)``."""
    size = x.shape[-1]
    power = size & -size
    outer = cosines(size // power).to(x)
    mixed = (x.unflatten(-1, (-1, power)).transpose(-1, -2) @ outer).transpose(-1, -2)
    step = 1
    while step < power:
        pairs = mixed.unflatten(-1, (-1, 2, step))
        mixed = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(-3)
        step *= 2
    return mixed.flatten(-2) / power**0.5


def basis(size: int) -> Tensor:
    """The transform as an orthogonal matrix [size, size], float64, that row vectors are multiplied by."""
    return transform(torch.eye(size, dtype=torch.float64))


def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform [size, size], float64: row k is cos(pi / size (i + 1/2) k)."""
    steps = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(torch.pi / size * (steps + 0.5) * steps[:, None])
    return waves / waves.norm(dim=-1, keepdim=True)


def _infer(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x = need(types[0])
    if x.rank == 0 or not isinstance(x.shape[-1], int):
        raise ValueError(f"the last axis of {x} has no known width")
    return [x]


OPS = (
    OpDef(
        "hadamard",
        "x",
        _infer,
        transform,
        axes="... d! -> ... d",
        doc="x times an orthogonal matrix of its width: a Hadamard matrix of the largest power of two in it, times a "
        "cosine transform of the rest (QuaRot, arXiv 2404.00456).",
    ),
)
