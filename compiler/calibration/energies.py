"""How much the model's loss depends on each vector that meets a product with a weight.

To second order an error E of a weight costs the sum over vectors x of 1/2 (g^T E x)^2, g being the gradient of the
model's own loss at what the product yields for x (see ``moments`` beside this). Of the rows of E apart from each other
that is e C e^T with C the sum of |g|^2 x x^T: vectors count by their energy |g|^2, as in GuidedQuant (arXiv
2505.07004). Energies are drawn, a label for each prediction, and a few hold most of their sum, so it is their power
``POWER`` by which vectors count: more of them then have a say, and what is measured holds on other data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from compiler.calibration.backward import Batches, backwards
from compiler.calibration.moments import key_of
from compiler.calibration.products import leaving
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.weights.spill import Progress

POWER = 0.5


class Energies:
    """The energies at products with weights, one tensor [vectors] a batch.

    There are none of experts, and none where the first output of the model does not depend on the product.
    """

    def __init__(self, by_param: Mapping[Param, Sequence[Tensor]]) -> None:
        self._by_param = by_param

    def counts(self, params: Sequence[Param]) -> list[Tensor] | None:
        """By how much each vector counts that ``params`` all meet: one on average. None where that is not known."""
        own = [_relative(self._by_param[param]) for param in params if param in self._by_param]
        if len(own) < len(params):
            return None
        counts = [torch.stack(batch).mean(0) ** POWER for batch in zip(*own, strict=True)]
        return _relative(counts)


def _relative(batches: Sequence[Tensor]) -> list[Tensor]:
    """``batches`` over the mean of all; ones where that is zero."""
    mean = float(torch.cat(list(batches)).mean())
    return [batch / mean if mean > 0 else torch.ones_like(batch) for batch in batches]


def energies(
    graph: Graph, nodes: Mapping[Param, Node], batches: Batches, progress: Progress, *, seed: int = 0
) -> Energies:
    """The energies at ``nodes``, each a product with its weight, over ``batches`` (inputs by name).

    What ``progress`` holds is not measured again. Labels and signs are drawn with ``seed``.
    """
    single = {param: node for param, node in nodes.items() if node.op.name != "experts"}
    name = f"energies-{key_of(graph, single, batches, (), seed)}"
    stored = progress.load(name)
    if stored is None:
        tape = _Tape(single)
        backwards(graph, batches, seed, tape)
        stored = {f"{index}.{batch}": part for index, (batch, part) in tape.flat()}
        progress.save(name, stored)
    found = {param: _in_turn(stored, index) for index, param in enumerate(single)}
    return Energies({param: parts for param, parts in found.items() if parts})


def _in_turn(stored: Mapping[str, Tensor], index: int) -> list[Tensor]:
    count = sum(name.startswith(f"{index}.") for name in stored)
    return [stored[f"{index}.{batch}"] for batch in range(count)]


class _Tape:
    """Sees a differentiable run, and keeps the energies at the outputs of products on the way back."""

    def __init__(self, nodes: Mapping[Param, Node]) -> None:
        self.forward = True
        self.samples = 1
        self._kept: dict[Param, list[Tensor]] = {param: [] for param in nodes}
        self._found: dict[Param, Tensor] = {}
        self._products: dict[Node, list[Param]] = {}
        for param, node in nodes.items():
            self._products.setdefault(node, []).append(param)

    def flat(self) -> Iterator[tuple[int, tuple[int, Tensor]]]:
        """The energies, with the numbers of their weight and batch."""
        return ((index, pair) for index, parts in enumerate(self._kept.values()) for pair in enumerate(parts))

    def see(self, value: Value, tensor: Tensor) -> None:
        if value.node not in self._products:
            return
        if not tensor.requires_grad:
            tensor.requires_grad_()
        if self.forward:
            tensor.register_hook(partial(self._add, value.node))

    def _add(self, node: Node, gradient: Tensor) -> None:
        with torch.no_grad():
            for param in self._products[node]:
                ((_, rows),) = leaving(node, param, gradient.detach(), {})
                self._found[param] = rows.float().square().sum(-1)

    def done(self) -> None:
        """Small tensors made among large ones keep the memory of those from being given back: one takes their place."""
        if not self._found:
            return
        sizes = [len(found) for found in self._found.values()]
        for param, part in zip(self._found, torch.cat(list(self._found.values())).split(sizes), strict=True):
            self._kept[param].append(part)
        self._found.clear()
