"""What was measured of an attention, stored until it is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from compiler.pipeline import Context
from compiler.weights.expr import Expr
from passes.gqa_to_mla.latent import Analysis, analyse
from passes.gqa_to_mla.moments import Moments
from passes.gqa_to_mla.source import Source


@dataclass(frozen=True)
class Measured:
    """The moments of ``source``, by name as expressions, and what it loses by each component [pairs, g] that rests."""

    source: Source
    stored: Mapping[str, Expr]
    loss: Tensor
    ctx: Context

    def analysis(self) -> Analysis:
        tensors = {name: self.ctx.value(expr) for name, expr in self.stored.items()}
        return analyse(self.source, Moments(**tensors))
