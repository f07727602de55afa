"""Vectors of pictures that take places in a text, as vision-language models put them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compiler.frontend.aten.shared import Handler, reshaped
from compiler.ir.graph import Value
from compiler.ir.types import dim_product

if TYPE_CHECKING:
    from compiler.frontend.importer import Importer


@dataclass(frozen=True)
class Sample:
    """One sample of a batch of any size: nothing can be done with it but joining it to all others again."""

    batch: Value
    number: int


@dataclass(frozen=True)
class Samples:
    """A batch of any size, taken apart into as many samples as the traced one had."""

    batch: Value

    def __getitem__(self, number: int) -> Sample:
        return Sample(self.batch, number)


def joined(importer: Importer, samples: Sequence[Sample]) -> Value:
    """The samples of a batch one after the other, [B * N, ...] of [B, N, ...]."""
    batch = samples[0].batch
    whole = [Sample(batch, number) for number in range(importer.sizes.get(str(batch.shape[0]), 0))]
    if list(samples) != whole:
        raise importer.fail("some samples of a batch without the others are not in the graph's vocabulary")
    first, second, *rest = batch.shape
    importer.joins = True
    return reshaped(importer, batch, (dim_product((first, second)), *rest))


def _masked_scatter(importer: Importer, x: Value, mask: Value, source: Value) -> Value:
    """x [B, T, D] with the rows of ``source`` [N, D] in order where ``mask`` [B, T, 1] holds."""
    batch, tokens, width = x.shape
    if mask.shape != (batch, tokens, 1) or source.type.rank != 2 or source.shape[1] != width:
        raise importer.fail(f"a scatter of {source.type} into {x.type} by {mask.type} is not in the graph's vocabulary")
    flags = importer.emit("cast", reshaped(importer, mask, (dim_product((batch, tokens)),)), dtype=torch.int64)
    number = importer.emit("sub", importer.emit("cumsum", flags), scalar=1)
    rows = importer.emit("take", source, importer.emit("maximum", number, scalar=0), axis=0)
    return importer.emit("where", mask, reshaped(importer, rows, x.shape), x)


HANDLERS: dict[str, Handler] = {"masked_scatter": _masked_scatter}
