"""Weights as lazy, typed expressions.

An expression says how a tensor is made (read this, transpose it, multiply those) and what type it has, without
touching a byte. Passes edit expressions; the writer evaluates each once, shard by shard. Expressions are immutable
and compare by content, so equal sub-expressions are computed once and ``Expr.key`` names a result for good.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from compiler.errors import OpError
from compiler.ir.types import DTYPE_NAMES, TensorType


@dataclass(frozen=True, eq=False)
class Expr:
    """A node of a weight expression. Build it with ``apply`` or the helpers below, never directly."""

    op: str
    args: tuple[Expr, ...]
    attrs: tuple[tuple[str, Any], ...]
    type: TensorType

    @cached_property
    def key(self) -> str:
        """A content hash: equal for equal expressions, across runs and machines."""
        digest = hashlib.sha256(f"{self.op}|{self.type}|{_canonical(self.attrs)}".encode())
        for arg in self.args:
            digest.update(arg.key.encode())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def attr(self, name: str) -> Any:
        return dict(self.attrs)[name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.static_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.type.dtype


def _canonical(attrs: tuple[tuple[str, Any], ...]) -> str:
    return ",".join(
        f"{name}={DTYPE_NAMES.get(value, None) or repr(value)}"
        if isinstance(value, torch.dtype)
        else f"{name}={value!r}"
        for name, value in attrs
    )


def apply(op: str, args: Sequence[Expr], attrs: Mapping[str, Any] | None = None) -> Expr:
    """The expression ``op(*args, **attrs)``, its type inferred. Raises OpError when they do not fit."""
    from compiler.weights.ops import weight_op

    definition = weight_op(op)
    attrs = dict(attrs or {})
    try:
        type = definition.infer([arg.type for arg in args], attrs)
    except (ValueError, KeyError, IndexError) as reason:
        shown = ", ".join(str(arg.type) for arg in args)
        raise OpError(f"weight expression `{op}({shown})` {attrs}: {reason}") from reason
    return Expr(op, tuple(args), tuple(sorted(attrs.items())), type)


def load(source: str, key: str, type: TensorType) -> Expr:
    """The tensor ``key`` of the checkpoint called ``source`` in the run ("model", "spill")."""
    return Expr("load", (), (("key", key), ("source", source)), type)


def loads(exprs: Sequence[Expr]) -> list[Expr]:
    """Every distinct ``load`` below ``exprs``, in first-use order."""
    seen: dict[str, Expr] = {}
    visited: set[str] = set()
    pending = list(reversed(exprs))
    while pending:
        expr = pending.pop()
        if expr.key in visited:
            continue
        visited.add(expr.key)
        if expr.op == "load":
            seen.setdefault(expr.key, expr)
        pending += reversed(expr.args)
    return list(seen.values())
