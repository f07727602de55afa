"""M: the second moments of the gradient of the model's loss at what products with weights yield.

They are measured by whole passes through the model, with at most ``GRADIENT_BYTES`` of sums at a time, in as many
passes as that takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from compiler.calibration.backward import Batches, backwards
from compiler.calibration.gram import gram
from compiler.calibration.products import expert_weights, leaving, matrix_shape, reads
from compiler.ir.graph import Graph, Node, Param, Value

FULL_WIDTH = 2048  # of outputs; of wider ones only the diagonal of M is kept
GRADIENT_BYTES = 2 << 30


def at_outputs(
    graph: Graph, nodes: Mapping[Param, Sequence[Node]], batches: Batches, seed: int
) -> Iterator[tuple[Param, Tensor]]:
    """M of each weight, over the products ``nodes`` with it: [experts, out, out], or [experts, out] of wide ones.

    Float64, and divided by the number of predictions. Labels and signs are drawn with ``seed``.
    """
    for part in _within_memory(list(nodes)):
        tape = _Tape(graph, {param: nodes[param] for param in part})
        predictions = backwards(graph, batches, seed, tape)
        yield from ((param, total / predictions) for param, total in tape.sums.items())


def _within_memory(params: Sequence[Param]) -> list[list[Param]]:
    """``params`` in runs whose sums take at most ``GRADIENT_BYTES``, or that are of one weight."""
    parts: list[list[Param]] = []
    free = 0
    for param in params:
        size = 8 * _gradient_sum(param).numel()
        if size > free or not parts:
            parts.append([])
            free = GRADIENT_BYTES
        parts[-1].append(param)
        free -= size
    return parts


def _gradient_sum(param: Param, device: str = "meta") -> Tensor:
    experts, rows, _ = matrix_shape(param)
    shape = (experts, rows, rows) if rows <= FULL_WIDTH else (experts, rows)
    return torch.zeros(shape, dtype=torch.float64, device=device)


class _Tape:
    """Sees a differentiable run, and adds up the gradients at the outputs of products on the way back."""

    def __init__(self, graph: Graph, nodes: Mapping[Param, Sequence[Node]]) -> None:
        self.sums = {param: _gradient_sum(param, "cpu") for param in nodes}
        self.forward = True
        self.samples = 1
        self._products: dict[Node, list[Param]] = {}
        for param, users in nodes.items():
            for node in users:
                self._products.setdefault(node, []).append(param)
        stacks = [node for node in self._products if node.op.name == "experts"]
        self._weights = expert_weights(graph, stacks)
        self._read = {value for node in stacks for value in reads(node)}
        self._known: dict[Value, Tensor] = {}

    def see(self, value: Value, tensor: Tensor) -> None:
        if value in self._read and self.forward:
            self._known[value] = tensor.detach()
        node = value.node
        if node not in self._products:
            return
        if not tensor.requires_grad:
            tensor.requires_grad_()
        if self.forward:
            tensor.register_hook(partial(self._add, node))

    def done(self) -> None:
        self._known.clear()

    def _add(self, node: Node, gradient: Tensor) -> None:
        with torch.no_grad():
            for param in self._products[node]:
                for expert, rows in leaving(node, param, gradient.detach(), {**self._known, **self._weights}):
                    total = self.sums[param]
                    total[expert] += rows.square().sum(0) if total.ndim == 2 else gram(rows)
