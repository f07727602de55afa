"""A block format as a ``Codec``: parts are its groups, and what parts of a block share is fitted to a matrix first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from compiler.weights.expr import Expr, apply
from compiler.weights.ops.codec import Parameters, row_chunks
from compiler.weights.ops.gguf.fitting import fitted, rounded, squared_error
from compiler.weights.ops.gguf.layout import Block, Layout
from compiler.weights.ops.gguf.layouts import LAYOUTS

NEAR = (0, -1, 1)  # integers around the nearest one that are tried for a scale or a minimum
LARGEST = torch.finfo(torch.float16).max
SHARED_TURNS = 2  # of fitting what the parts of a block share to their codes


@dataclass(frozen=True)
class Blocks:
    """The format ``name``. Parameters of a part are d, e (float32 of float16 values), s and m; see ``Layout``.

    ``shared`` is d and e of every part of a matrix [rows, parts], or of one part [rows]; formats of one part have none.
    """

    name: str
    search: bool = True
    shared: tuple[Tensor, Tensor] | None = None

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.name]

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def group(self) -> int:
        return self.layout.part

    @property
    def by_rows(self) -> bool:
        return self.layout.parts == 1

    def for_matrix(self, matrix: Tensor, energy: Tensor | None = None) -> Blocks:
        if self.layout.parts == 1:
            return self
        parts = matrix.float().unflatten(-1, (-1, self.group))
        weights = torch.ones(parts.shape[1:]) if energy is None else energy.float().reshape(parts.shape[1:])
        found = [self._shared(rows, weights) for (rows,) in row_chunks([parts])]
        d, e = (torch.cat(each) for each in zip(*found, strict=True))
        return replace(self, shared=(d, e))

    def at(self, index: int) -> Blocks:
        return self if self.shared is None else replace(self, shared=tuple(each[:, index] for each in self.shared))

    def reading(self, value: Callable[[Expr], Tensor]) -> Blocks:
        return self

    def nearest(self, weight: Expr) -> Expr:
        return self.expression([apply("gguf_blocks", [weight], {"format": self.name, "search": self.search})])

    def rounded(self, rows: Tensor) -> Tensor:
        """``rows`` float32 [rows, in] rounded to nearest, as bytes."""
        codec, parts = self.for_matrix(rows), rows.unflatten(-1, (-1, self.group))
        parameters = codec.fit(parts)
        return codec.stored(codec.encode(parts, parameters).flatten(1), parameters)[0]

    def fit(self, values: Tensor, weights: Tensor | None = None) -> Parameters:
        counted = torch.ones(()) if weights is None else weights.float()
        scale, least = fitted(values.float(), counted, self.layout, search=self.search)
        one = torch.ones_like(scale)
        if self.layout.parts == 1:
            return _half(scale), _half(least), one, one
        assert self.shared is not None, "for_matrix comes first"
        d, e = self.shared
        return d, e, *self._integers(values.float(), counted, (scale, least), (d, e))

    def encode(self, values: Tensor, parameters: Parameters) -> Tensor:
        return rounded(values.float(), *_products(parameters), self.layout).to(torch.int8)

    def decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        scale, least = _products(parameters)
        return codes.float() * scale.unsqueeze(-1) - least.unsqueeze(-1)

    def rescaled(self, parameters: Parameters, factors: Tensor) -> Parameters:
        d, e, scale, least = parameters
        if self.layout.parts == 1:
            return _half(d * factors), _half(e * factors), scale, least
        return d, e, *self._clamped(scale * factors, least * factors)

    def stored(self, codes: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
        layout = self.layout
        d, e, scale, least = (part.reshape(-1, layout.parts) for part in parameters)
        block = Block(codes.reshape(-1, layout.size), scale.int(), least.int(), d[:, 0].half(), e[:, 0].half())
        return (layout.pack(block).reshape(len(codes), -1),)

    def expression(self, parts: Sequence[Expr]) -> Expr:
        return apply("dequantize_gguf", parts, {"format": self.name})

    def _shared(self, parts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """d and e of every part, [rows, parts] each, for values [rows, parts, part]."""
        wanted = fitted(parts, weights, self.layout, search=self.search)
        d, e = (self._first(each, top) for each, top in zip(wanted, self._tops, strict=True))
        error = self._error(parts, weights, wanted, (d, e))
        for _ in range(SHARED_TURNS if self.search else 0):
            scale, least = self._integers(parts, weights, wanted, (d, e))
            codes = rounded(parts, d * scale, e * least, self.layout)
            others = self._by_codes(parts, weights, codes * scale.unsqueeze(-1), least)
            own = self._error(parts, weights, wanted, others)
            better = own < error
            d, e = (other.where(better, each) for other, each in zip(others, (d, e), strict=True))
            error = own.where(better, error)
        return d, e

    @property
    def _tops(self) -> tuple[int, int]:
        """The integers that the largest scale and the largest minimum of a block become."""
        low, high = self.layout.scales
        return low or high, self.layout.most

    def _first(self, wanted: Tensor, top: int) -> Tensor:
        """What parts share where the largest of ``wanted`` [rows, parts] becomes ``top``."""
        blocks = wanted.unflatten(-1, (-1, self.layout.parts))
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        return self._spread(_half(extreme / top if top else extreme * 0))

    def _by_codes(self, parts: Tensor, weights: Tensor, codes: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        """d and e of least squared error for parts ~ d * codes - e * least."""
        blocks = [self._blocked(each) for each in (parts, weights.expand(parts.shape), codes)]
        lower = self._blocked(least.unsqueeze(-1).expand(parts.shape))
        values, counted, codes = blocks
        sums = {
            "qq": (counted * codes * codes).sum(-1),
            "qm": (counted * codes * lower).sum(-1),
            "mm": (counted * lower * lower).sum(-1),
            "qx": (counted * codes * values).sum(-1),
            "mx": (counted * lower * values).sum(-1),
        }
        determinant = sums["qq"] * sums["mm"] - sums["qm"].square()
        regular = determinant > 1e-6 * sums["qq"] * sums["mm"]
        divisor = determinant.where(regular, 1.0)
        alone = sums["qx"] / sums["qq"].clamp(min=torch.finfo(torch.float32).tiny)
        d = ((sums["mm"] * sums["qx"] - sums["qm"] * sums["mx"]) / divisor).where(regular, alone)
        e = ((sums["qm"] * sums["qx"] - sums["qq"] * sums["mx"]) / divisor).where(regular, 0.0)
        return self._spread(_half(d).unsqueeze(-1)), self._spread(_half(e).unsqueeze(-1))

    def _integers(
        self, values: Tensor, weights: Tensor, wanted: tuple[Tensor, Tensor], shared: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """s and m of every part with the least error beside ``wanted``, given d and e."""
        d, e = shared
        near = [torch.where(by == 0, 0.0, each / by).round() for each, by in zip(wanted, shared, strict=True)]
        best, error = self._clamped(near[0], near[1]), torch.full(d.shape, torch.inf)
        for step, lower in product(NEAR if self.search else (0,), NEAR if self.search and self.layout.most else (0,)):
            scale, least = self._clamped(near[0] + step, near[1] + lower)
            own = squared_error(values, weights, d * scale, e * least, self.layout)
            better = own < error
            best = scale.where(better, best[0]), least.where(better, best[1])
            error = own.where(better, error)
        return best

    def _error(
        self, parts: Tensor, weights: Tensor, wanted: tuple[Tensor, Tensor], shared: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The error of every block with ``shared``, at each of its parts."""
        scale, least = self._integers(parts, weights, wanted, shared)
        own = squared_error(parts, weights, shared[0] * scale, shared[1] * least, self.layout)
        return self._spread(own.unflatten(-1, (-1, self.layout.parts)).sum(-1, keepdim=True))

    def _clamped(self, scale: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        return scale.round().clamp(*self.layout.scales), least.round().clamp(0, self.layout.most)

    def _blocked(self, parts: Tensor) -> Tensor:
        return parts.flatten(1).unflatten(-1, (-1, self.layout.size))

    def _spread(self, blocks: Tensor) -> Tensor:
        """[rows, blocks, 1] at every part: [rows, parts]."""
        return blocks.expand(*blocks.shape[:-1], self.layout.parts).flatten(1)


def values_of(data: Tensor, layout: Layout) -> Tensor:
    """float32 [rows, in]: the values of blocks, bytes [rows, bytes]."""
    block = layout.unpack(data.reshape(-1, layout.nbytes))
    parts = block.codes.float().unflatten(-1, (layout.parts, layout.part))
    scale, least = (block.d.float()[:, None] * block.scale), (block.e.float()[:, None] * block.least)
    return (parts * scale.unsqueeze(-1) - least.unsqueeze(-1)).reshape(len(data), -1)


def _products(parameters: Parameters) -> tuple[Tensor, Tensor]:
    d, e, scale, least = parameters
    return d * scale, e * least


def _half(values: Tensor) -> Tensor:
    """Rounded to float16, which never becomes infinite."""
    return values.clamp(-LARGEST, LARGEST).half().float()
