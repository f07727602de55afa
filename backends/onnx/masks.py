"""What attention may look at, as numbers added to its scores: 0 where it may, the least float where it may not.

Padding may lie on either side. Positions count the tokens that are there, so they and windows mean the same with and
without padding: a sample's token i is at position i wherever it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from compiler.ir.graph import Node, Value
from compiler.ir.types import Dim

if TYPE_CHECKING:
    from backends.onnx.builder import Builder

END = torch.iinfo(torch.int64).max
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Staged:
    """The positions of a stage's tokens: of ``new`` ones [B, K], less than 0 for padding, and as ``turns`` not less; of
    all ``keys`` [B, S] and whether they ``exists``."""

    new: ir.Value
    turns: ir.Value
    keys: ir.Value
    exists: ir.Value


@dataclass
class Masks:
    """``given`` int64 [B, S] is 1 where there is a token; ``tokens`` is the dim of new tokens, ``cached`` says that
    there may be tokens before them (then S is longer). ``kept`` are masks of fewer tokens by their dim, and ``written``
    says which of the places that tokens come from are their sample's own. ``room`` is how many keys the buffers of
    latents hold."""

    build: Builder
    given: ir.Value | None = None
    tokens: Dim = ""
    cached: bool = False
    source: ir.Value | None = None
    source_tokens: Dim = ""
    kept: dict[Dim, ir.Value] = field(default_factory=dict[Dim, "ir.Value"])
    written: dict[Value, ir.Value] = field(default_factory=dict["Value", "ir.Value"])
    room: ir.Value | None = None
    made: dict[object, ir.Value | None] = field(default_factory=dict[object, "ir.Value | None"])
    staged: dict[Dim, Staged] = field(default_factory=dict[Dim, "Staged"])

    def of(self, node: Node) -> ir.Value | None:
        """What is added to the scores [B, H, T, S] of an attention; None when nothing is masked."""
        length = node.input(1).shape[1 if node.op.name == "latent_attention" else 2]
        queries = node.input(0).shape[2]
        room = self.room if node.op.name == "latent_attention" else None
        key = (node.attr("causal"), node.attr("window"), length, queries, room is not None)
        if key not in self.made:
            allowed = self._allowed(node, queries, length)
            mask = None if allowed is None else self.additive(allowed)
            self.made[key] = mask if mask is None or room is None else self._beyond(mask, room)
        return self.made[key]

    def _beyond(self, mask: ir.Value, room: ir.Value) -> ir.Value:
        """``mask`` for ``room`` keys, of which those behind the last token are none."""
        build = self.build
        behind = build.op("Sub", room, build.op("Shape", self.given, start=1, end=2))
        pads = build.op("Concat", build.ints(*[0] * 7), behind, axis=0)
        return build.op("Pad", mask, pads, build.scalar(LOWEST))

    def exists_of(self, length: Dim) -> ir.Value | None:
        """Which of so many tokens are there, int64 [B, length]; None when all of them are."""
        if length == self.tokens:
            return self.new() if self.cached else self.given
        return self.source if length == self.source_tokens else self.kept.get(length)

    def _allowed(self, node: Node, queries: Dim, length: Dim) -> ir.Value | None:
        causal, window = node.attr("causal"), node.attr("window")
        if self.cached and length == self.tokens and self.given is not None:
            return self._between(self.query_places(), self.key_places(), window, causal=True, given=self.given)
        if length in self.staged:
            stage = self.staged[length]
            return self._between(stage.turns, stage.keys, window, causal=True, given=stage.exists)
        given = self.exists_of(length)
        rows, columns = (self.count(dim) for dim in (queries, length)) if causal or window else (None, None)
        return self._between(rows, columns, window, causal=causal, given=given)

    def _between(
        self, rows: ir.Value | None, columns: ir.Value | None, window: int, *, causal: bool, given: ir.Value | None
    ) -> ir.Value | None:
        """Bools that broadcast to [B, 1, T, S]; ``rows`` and ``columns`` are positions [B or 1, T] and [B or 1, S]."""
        build = self.build
        parts = [] if given is None else [build.op("Cast", self._key_axis(given), to=ir.DataType.BOOL)]
        if rows is not None and columns is not None:
            row = build.op("Unsqueeze", rows, build.ints(1, 3))
            column = self._key_axis(columns)
            parts += [build.op("LessOrEqual", column, row)] if causal else []
            wide = build.scalar(window, torch.int64)
            parts += [build.op("Less", build.op("Sub", row, column), wide)] if window else []
            parts += [build.op("Less", build.op("Sub", column, row), wide)] if window and not causal else []
        allowed = None
        for part in parts:
            allowed = part if allowed is None else build.op("And", allowed, part)
        return allowed

    def _key_axis(self, value: ir.Value) -> ir.Value:
        return self.build.op("Unsqueeze", value, self.build.ints(1, 2))

    def additive(self, allowed: ir.Value) -> ir.Value:
        return self.build.op("Where", allowed, self.build.scalar(0.0), self.build.scalar(LOWEST))

    def exists(self, keys: ir.Value) -> ir.Value:
        """What is added to scores where ``keys`` [B, S] are true for keys that exist."""
        return self.additive(self.build.op("Cast", self._key_axis(keys), to=ir.DataType.BOOL))

    def count(self, dim: Dim) -> ir.Value:
        """0, 1, 2, ... as [1, dim]."""
        build, nothing = self.build, self.build.ints(0)
        stop = build.op("Squeeze", build.dim(dim), nothing)
        counted = build.op("Range", build.scalar(0, torch.int64), stop, build.scalar(1, torch.int64))
        return build.op("Unsqueeze", counted, nothing)

    def key_places(self) -> ir.Value:
        """The position [B, S] of every token there is; padding before the first has position 0."""
        if "keys" not in self.made:
            build = self.build
            counted = build.op("CumSum", self.given, build.scalar(1, torch.int64))
            before = build.op("Sub", counted, build.scalar(1, torch.int64))
            self.made["keys"] = build.op("Max", before, build.scalar(0, torch.int64))
        found = self.made["keys"]
        assert found is not None  # made above
        return found

    def new(self) -> ir.Value:
        """Which of the new tokens are there, int64 [B, T]."""
        if "new" not in self.made:
            build, start = self.build, self.build.op("Neg", self.build.dim(self.tokens))
            self.made["new"] = build.op("Slice", self.given, start, build.ints(END), build.ints(1))
        found = self.made["new"]
        assert found is not None  # made above
        return found

    def first_column(self) -> ir.Value:
        """The column [1] of the first new token among all S."""
        total = self.build.op("Shape", self.given, start=1, end=2)
        return self.build.op("Sub", total, self.build.dim(self.tokens))

    def query_columns(self) -> ir.Value:
        """The column [1, T] of every new token among all S."""
        build = self.build
        total = build.op("Squeeze", build.op("Shape", self.given, start=1, end=2), build.ints(0))
        first = build.op("Sub", total, build.op("Squeeze", build.dim(self.tokens), build.ints(0)))
        return build.op("Unsqueeze", build.op("Range", first, total, build.scalar(1, torch.int64)), build.ints(0))

    def last_tokens(self) -> ir.Value:
        """Where among new tokens each sample's last one is, [B, 1, 1]."""
        build = self.build
        return build.op("Unsqueeze", build.op("ArgMax", self.new(), axis=1, select_last_index=1), build.ints(-1))

    def query_places(self) -> ir.Value:
        """The position [B, T] of every new token."""
        if "queries" not in self.made:
            build = self.build
            start = build.op("Neg", build.dim(self.tokens))
            self.made["queries"] = build.op("Slice", self.key_places(), start, build.ints(END), build.ints(1))
        found = self.made["queries"]
        assert found is not None  # made above
        return found
