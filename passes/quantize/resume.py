"""Solved weights in a run's progress, for one that was interrupted to go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.calibration.moments import key_of
from compiler.ir.graph import Graph, Param
from compiler.weights.spill import Progress

if TYPE_CHECKING:
    from passes.quantize import Quantize

Batches = Sequence[Mapping[str, Tensor]]


class Solved:
    """The stored tensors of every weight and its error, for one model, data, options and number of bits each."""

    def __init__(
        self, progress: Progress, graph: Graph, wanted: Quantize, bits: Mapping[Param, int], batches: Batches
    ) -> None:
        widths = " ".join(f"{param.name} {width}" for param, width in bits.items())
        key = f"{key_of(graph, bits, batches, (), 0)} {wanted!r} {widths}"
        self._progress, self._key = progress, hashlib.sha256(key.encode()).hexdigest()[:16]

    def save(self, param: Param, parts: Sequence[Tensor], error: float) -> None:
        bundle = {f"part{index}": part for index, part in enumerate(parts)}
        self._progress.save(self._name(param), {**bundle, "error": torch.tensor(error, dtype=torch.float64)})

    def load(self, group: Sequence[Param]) -> dict[Param, tuple[list[Tensor], float]]:
        """The parts and the errors of ``group``, which was measured together; nothing if one of them is missing."""
        found = {param: self._progress.load(self._name(param)) for param in group}
        known = {param: bundle for param, bundle in found.items() if bundle is not None}
        return {param: _read(bundle) for param, bundle in known.items()} if len(known) == len(found) else {}

    def _name(self, param: Param) -> str:
        return f"solved-{self._key}-{param.name}"


def _read(bundle: Mapping[str, Tensor]) -> tuple[list[Tensor], float]:
    return [bundle[f"part{index}"] for index in range(len(bundle) - 1)], float(bundle["error"])
