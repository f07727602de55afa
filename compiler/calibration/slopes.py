"""What the loss changes by, to first order, without a channel: Taylor's criterion for what products read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from compiler.calibration.backward import Batches, backwards
from compiler.calibration.moments import Store, key_of
from compiler.calibration.products import products
from compiler.ir.graph import Graph, Param, Value
from compiler.weights.spill import Progress


class _Slopes:
    """Sees a differentiable run, and adds up |sum of x dL/dx| of every sample at the values that products read."""

    def __init__(self, channels: Mapping[Value, int]) -> None:
        self.sums: dict[Value, Tensor] = {}
        self.forward = True
        self.samples = 1
        self._channels = channels

    def see(self, value: Value, tensor: Tensor) -> None:
        if value not in self._channels:
            return
        if not tensor.requires_grad:
            tensor.requires_grad_()
        if self.forward:
            tensor.register_hook(partial(self._add, value, tensor.detach()))

    def done(self) -> None:
        """Sums are complete at any time."""

    def _add(self, value: Value, x: Tensor, gradient: Tensor) -> None:
        slopes = (x * gradient).movedim(self._channels[value], -1)
        total = slopes.reshape(self.samples, -1, slopes.shape[-1]).sum(1, dtype=torch.float64).abs().sum(0)
        self.sums[value] = self.sums.get(value, 0) + total


def slopes(
    graph: Graph, params: Sequence[Param], batches: Batches, progress: Progress, *, seed: int = 0
) -> dict[Param, Tensor]:
    """What the loss of a sample changes by, to first order, without each channel that a weight reads: float64 [in].

    That is |sum over tokens of x dL/dx|, the mean over predictions (Molchanov et al., arXiv 1906.10771). Activations of
    one batch stay in memory. Weights of experts, which no value enters as they are, are left out.
    """
    users = [(param, node) for param, nodes in products(graph).items() if param in set(params) for node in nodes]
    reading = [(param, node) for param, node in users if node.op.name != "experts"]
    store, key = Store(progress), f"slopes-{key_of(graph, dict.fromkeys(params), (), batches, seed)}"
    if key not in store:
        tape = _Slopes({node.input(0): 1 if node.op.name == "conv" else -1 for _, node in reading})
        predictions = backwards(graph, batches, seed, tape)
        found = {param.name: tape.sums[x] for param, node in reading if (x := node.input(0)) in tape.sums}
        store.save(key, {name: total / predictions for name, total in found.items()})
    known = store.load(key)
    return {param: known[param.name] for param in params if param.name in known}
