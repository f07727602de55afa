"""Runs forward and back: the gradient of the model's own loss, before the eyes of whoever measures it.

Of logits the loss is that of labels drawn from the model's own distribution; of other outputs the gradient is that of a
random signed sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from compiler.calibration.sweep import differentiable, quick_products, quick_weight
from compiler.ir.graph import Graph, Value

RESIDENT_BYTES = 4 << 30  # weights up to this much stay in memory while gradients are taken

Batches = Sequence[Mapping[str, Tensor]]


class Tape(Protocol):
    """What sees every value of a run forward and back; ``samples`` is the size of the batch at hand."""

    forward: bool
    samples: int

    def see(self, value: Value, tensor: Tensor) -> None:
        """``tensor`` is computed."""
        ...

    def done(self) -> None:
        """A batch has been run forward and back."""
        ...


def backwards(graph: Graph, batches: Batches, seed: int, tape: Tape) -> float:
    """Run ``batches`` forward and back before the eyes of ``tape``. Returns for how many predictions that counts."""
    source = torch.Generator().manual_seed(seed)
    held = sum(param.type.numel * 4 for param in graph.params.values()) <= RESIDENT_BYTES
    weights: dict[Value, Tensor] = {p: quick_weight(graph, p) for p in graph.params.values()} if held else {}
    name = next(iter(graph.outputs))
    predictions = 0.0
    for batch in batches:
        tape.forward, tape.samples = True, len(next(iter(batch.values())))
        with quick_products():
            output = differentiable(graph, batch, weights, observe=tape.see)[name]
            tape.forward = False
            gradient, count = _at_output(output.detach().float(), name == "logits", source)
            if output.requires_grad:
                output.backward(gradient.to(output.dtype))
        tape.done()
        predictions += count
    return predictions


def _at_output(output: Tensor, logits: bool, source: torch.Generator) -> tuple[Tensor, float]:
    """A draw of the gradient at the output, and how many predictions it counts for: see the module's docstring."""
    if not logits:
        signs = torch.randint(0, 2, output.shape, generator=source).to(output) * 2 - 1
        return signs, float(output.double().square().sum()) / 2
    chances = output.softmax(-1).reshape(-1, output.shape[-1])
    labels = drawn(chances, source)
    return chances.scatter_add(1, labels, -torch.ones_like(chances[:, :1])).view(output.shape), float(len(chances))


def drawn(chances: Tensor, source: torch.Generator) -> Tensor:
    """A class for each row of ``chances`` [rows, classes], int64 [rows, 1], as likely as it says.

    By the inverse of their sums: torch.multinomial takes ten times as long for the classes of a vocabulary.
    """
    sums = chances.cumsum(-1)
    draws = 1 - torch.rand(len(sums), 1, generator=source)  # above 0: what has no chance is not drawn
    return torch.searchsorted(sums, draws * sums[:, -1:])
