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
from passes.quantize.experts import Bits

if TYPE_CHECKING:
    from passes.quantize import Quantize

Numbers = Mapping[str, float]
Batches = Sequence[Mapping[str, Tensor]]


class Solved:
    """What is stored and reported of every weight, for one model, data, options and number of bits each."""

    def __init__(self, progress: Progress, graph: Graph, wanted: Quantize, bits: Bits, batches: Batches) -> None:
        widths = " ".join(f"{param.name} {width}" for param, width in bits.items())
        key = f"{key_of(graph, bits, batches, (), 0)} {wanted!r} {widths}"
        self._progress, self._key = progress, hashlib.sha256(key.encode()).hexdigest()[:16]

    def distance(self) -> float | None:
        """How far a trial with these numbers of bits was from the original; None where it has not ended."""
        found = self._progress.load(self._trial)
        return None if found is None else float(found["distance"])

    def end_trial(self, params: Sequence[Param], distance: float) -> None:
        """Keep ``distance`` alone of a trial that solved for ``params``."""
        self._progress.save(self._trial, {"distance": torch.tensor(distance, dtype=torch.float64)})
        for param in params:
            self._progress.drop(self._name(param))

    def save(self, param: Param, parts: Sequence[Tensor], numbers: Numbers) -> None:
        bundle = {f"part{index}": part for index, part in enumerate(parts)}
        values = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        self._progress.save(self._name(param), {**bundle, **values})

    def load(self, group: Sequence[Param]) -> dict[Param, tuple[list[Tensor], Numbers]]:
        """The parts and the numbers of ``group``, which was measured together; nothing if one of them is missing."""
        found = {param: self._progress.load(self._name(param)) for param in group}
        known = {param: bundle for param, bundle in found.items() if bundle is not None}
        return {param: _read(bundle) for param, bundle in known.items()} if len(known) == len(found) else {}

    @property
    def _trial(self) -> str:
        return f"trial-{self._key}"

    def _name(self, param: Param) -> str:
        return f"solved-{self._key}-{param.name}"


def _read(bundle: Mapping[str, Tensor]) -> tuple[list[Tensor], Numbers]:
    numbers = {name: float(tensor) for name, tensor in bundle.items() if not name.startswith("part")}
    return [bundle[f"part{index}"] for index in range(len(bundle) - len(numbers))], numbers
