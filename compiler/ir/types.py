"""Tensor types: a dtype and a shape whose dims are integers or symbolic expressions.

A symbolic dim is the canonical text of a polynomial over the graph's dim names, such as ``"T"`` or
``"B*T"``. Text, because a dim is printed, parsed, compared and hashed far more often than computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import torch

Dim = int | str
Shape = tuple[Dim, ...]

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
}
DTYPES_BY_NAME: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorType:
    """The dtype and shape of a value. ``str(TensorType(torch.float32, ("B", 8))) == "f32[B,8]"``."""

    dtype: torch.dtype
    shape: Shape

    def __str__(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}[{','.join(map(str, self.shape))}]"

    @property
    def rank(self) -> int:
        return len(self.shape)

    @cached_property
    def static_shape(self) -> tuple[int, ...]:
        """The shape as integers. Raises ValueError when a dim is symbolic."""
        dims = tuple(dim for dim in self.shape if isinstance(dim, int))
        if len(dims) != len(self.shape):
            raise ValueError(f"{self} has symbolic dims")
        return dims

    @property
    def numel(self) -> int:
        """Number of elements of a static type."""
        return math.prod(self.static_shape)

    @property
    def nbytes(self) -> int:
        """Bytes of a static, dense tensor of this type."""
        return self.numel * self.dtype.itemsize

    def with_shape(self, shape: Iterable[Dim]) -> TensorType:
        return TensorType(self.dtype, tuple(shape))

    def with_dtype(self, dtype: torch.dtype) -> TensorType:
        return TensorType(dtype, self.shape)


@cache
def canonical_dim(text: str) -> Dim:
    """Reduce an arithmetic expression over dim names to its canonical text, or to an int."""
    import sympy

    value: Any = sympy.expand(_symbolic(text, _symbols(text)))
    return int(value) if value.is_Integer else str(value).replace(" ", "")


def _symbols(text: str) -> dict[str, Any]:
    import sympy

    return {name: sympy.Symbol(name, integer=True, positive=True) for name in _names(text)}


def _symbolic(text: str, symbols: Mapping[str, Any]) -> Any:
    import sympy

    sympify: Any = sympy.sympify  # its declared overloads leave out `locals`
    return sympify(text, locals=symbols)


def _names(text: str) -> set[str]:
    import re

    return set(re.findall(r"[A-Za-z_]\w*", text)) - {"Max", "Min", "floor", "ceiling", "Mod"}


def named_multiple(dim: Dim) -> tuple[str, int] | None:
    """The name that a dim is so many times of: ``("B", 4)`` for ``"4*B"``, ``("T", 1)`` for ``"T"``, else None."""
    times, star, name = str(dim).rpartition("*")
    if not name.isidentifier() or (star and not times.isdigit()):
        return None
    return name, int(times or 1)


def dim_product(dims: Iterable[Dim]) -> Dim:
    """The canonical product of dims: ``dim_product(("B", 4, "T")) == "4*B*T"``."""
    dims = tuple(dims)
    if all(isinstance(dim, int) for dim in dims):
        return math.prod(dim for dim in dims if isinstance(dim, int))
    return canonical_dim("*".join(f"({dim})" for dim in dims))


def dim_sum(dims: Iterable[Dim]) -> Dim:
    """The canonical sum of dims: ``dim_sum(("T", 1)) == "T+1"``."""
    dims = tuple(dims)
    if all(isinstance(dim, int) for dim in dims):
        return sum(dim for dim in dims if isinstance(dim, int))
    return canonical_dim("+".join(f"({dim})" for dim in dims))


def substituted(dim: Dim, names: Mapping[str, Dim]) -> Dim:
    """``dim`` with other dims for some of its parts: ``substituted("B*floor(T/2)", {"floor(T/2)": "K"}) == "B*K"``."""
    if isinstance(dim, int) or not names:
        return dim
    return names[dim] if dim in names else _substituted(dim, tuple(names.items()))


@lru_cache(maxsize=4096)
def _substituted(dim: str, names: tuple[tuple[str, Dim], ...]) -> Dim:
    symbols = _symbols(" ".join([dim, *(f"{old} {new}" for old, new in names)]))
    pairs = [(_symbolic(old, symbols), _symbolic(str(new), symbols)) for old, new in names]
    return canonical_dim(str(_symbolic(dim, symbols).subs(pairs)))


def resolve_dim(dim: Dim, bindings: Mapping[str, int]) -> int:
    """The integer a dim stands for under ``bindings`` (dim name to size)."""
    if isinstance(dim, int):
        return dim
    if dim in bindings:
        return bindings[dim]
    return _evaluate(dim, tuple(sorted(bindings.items())))


@lru_cache(maxsize=4096)
def _evaluate(dim: str, bindings: tuple[tuple[str, int], ...]) -> int:
    symbols = _symbols(dim)
    value = _symbolic(dim, symbols).subs({symbols[k]: v for k, v in bindings if k in symbols})
    if not value.is_Integer:
        raise ValueError(f"dim {dim} is not determined by {dict(bindings)}")
    return int(value)
