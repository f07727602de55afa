"""What was measured and made of an attention, stored until it is wanted, so that memory holds about one layer's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from torch import Tensor

from compiler.pipeline import Context
from compiler.weights.expr import Expr
from passes.gqa_to_mla.latent import Analysis, LatentMaps, analyse
from passes.gqa_to_mla.moments import Moments
from passes.gqa_to_mla.source import Source

T = TypeVar("T", Moments, LatentMaps)


@dataclass(frozen=True)
class Stored(Generic[T]):
    """A dataclass of tensors and numbers, its tensors in the work directory."""

    kind: Callable[..., T]
    parts: Mapping[str, Any]
    ctx: Context

    def read(self) -> T:
        parts = {name: self.ctx.value(part) if isinstance(part, Expr) else part for name, part in self.parts.items()}
        return self.kind(**parts)


def store(ctx: Context, name: str, item: T) -> Stored[T]:
    """Put the tensors of ``item`` into the work directory."""
    parts = {field.name: getattr(item, field.name) for field in fields(item)}
    kept = {key: ctx.spill(f"{name}-{key}", part) if isinstance(part, Tensor) else part for key, part in parts.items()}
    return Stored(type(item), kept, ctx)


@dataclass(frozen=True)
class Measured:
    """The moments of ``source``, and what it loses by each component [pairs, g] that rests."""

    source: Source
    moments: Stored[Moments]
    loss: Tensor

    def analysis(self) -> Analysis:
        return analyse(self.source, self.moments.read())
