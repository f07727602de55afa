"""Published ways to set elements of decoder weights to zero, reimplemented as published to be measured beside ours.

All linear maps of the decoder layers; ``keep`` of the elements remain, or N of each M consecutive inputs. Layers are
taken in order: what enters the linear maps of a layer is what the layer computes with its own dense weights from what
the sparse layers before it pass on.

`magnitude`: the largest |w| of each matrix remain. `wanda` (arXiv 2306.11695): the largest |w| times the norm of its
input, row by row. `sparsegpt` (arXiv 2301.00774): blocks of 128 columns, damping of 0.01 of the mean diagonal of
H = 2 X^T X / N, inputs that are always zero taken out, errors made up for by the columns to the right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoders import Peer, Row, watch

BLOCK, DAMPING = 128, 0.01

Pattern = tuple[int, int]
Part = float | Pattern
Method = Callable[[Tensor, Tensor, Part], Tensor]
"""From a weight [out, in], the sum of x x^T [in, in] over what enters it and a part to the sparse weight."""


class Entered(Exception):
    """The first layer was reached."""


def settings(keep: float, model: Any) -> list[Row]:
    return [{"keep": keep}, *([{"pattern": "2:4"}] if keep == 0.5 else [])]


def apply(model: Any, windows: Tensor, method: Method, keep: float = 0.5, pattern: str = "") -> int:
    """Make ``model`` sparse in place. Returns how many elements are zero."""
    few, _, many = pattern.partition(":")
    part: Part = (int(few), int(many)) if pattern else keep
    zeros = 0
    states, given = entering(model, windows)
    for layer in model.base_model.layers:
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        sums = {one: torch.zeros(one.in_features, one.in_features, dtype=torch.float64) for one in linears}
        forward = partial(through, layer, states, given)
        watch(forward, {one: partial(add, total) for one, total in sums.items()})
        for one, total in sums.items():
            one.weight.data = method(one.weight.data, total.float() / states.shape[:-1].numel(), part)
            zeros += int((one.weight == 0).sum())
        states = forward()
    return zeros


def add(total: Tensor, rows: Tensor) -> None:
    total.addmm_(rows.T, rows)


@torch.no_grad()
def entering(model: Any, windows: Tensor) -> tuple[Tensor, Row]:
    """What enters the first layer, [count, 1, length, width], and the layer's other arguments."""
    found: list[Tensor] = []
    given: Row = {}

    def stop(_: Any, args: Any, kwargs: Row) -> None:
        found.append(args[0])
        given.update(kwargs)
        raise Entered

    hook = model.base_model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    for ids in windows:
        try:
            model.base_model(input_ids=ids[None], use_cache=False)
        except Entered:
            continue
    hook.remove()
    return torch.stack(found), given


@torch.no_grad()
def through(layer: nn.Module, states: Tensor, given: Row) -> Tensor:
    return torch.stack([layer(state, **given) for state in states])


def largest(scores: Tensor, part: Part) -> Tensor:
    """Bool: of each row of ``scores`` the largest, or of each M consecutive ones."""
    if isinstance(part, tuple):
        return largest(scores.unflatten(-1, (-1, part[1])), part[0] / part[1]).flatten(-2)
    order = scores.argsort(dim=-1, descending=True)[..., : round(part * scores.shape[-1])]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def magnitude(weight: Tensor, second: Tensor, part: Part) -> Tensor:
    scores = weight.abs() if isinstance(part, tuple) else weight.abs().view(1, -1)
    return weight * largest(scores, part).view(weight.shape)


def wanda(weight: Tensor, second: Tensor, part: Part) -> Tensor:
    return weight * largest(weight.abs() * second.diagonal().sqrt(), part)


def sparsegpt(weight: Tensor, second: Tensor, part: Part) -> Tensor:
    weight, hessian, columns = weight.clone(), 2 * second, weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = in_block(weight[:, start:stop], factor[start:stop, start:stop], part)
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight


def in_block(block: Tensor, factor: Tensor, part: Part) -> Tensor:
    """Zeros of a block of columns, made up for within it, in place. Returns what is left to the columns after it."""
    kept = torch.ones_like(block, dtype=torch.bool)
    if not isinstance(part, tuple):
        kept = largest((block / factor.diagonal()).square().view(1, -1), part).view(block.shape)
    errors = torch.zeros_like(block)
    for i in range(block.shape[1]):
        if isinstance(part, tuple) and i % part[1] == 0:
            group = slice(i, i + part[1])
            kept[:, group] = largest((block[:, group] / factor.diagonal()[group]).square(), part)
        errors[:, i] = block[:, i] * ~kept[:, i] / factor[i, i]
        block[:, i:] -= torch.outer(errors[:, i], factor[i, i:])
        block[:, i] *= kept[:, i]
    return errors


METHODS: dict[str, Method] = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}
PEERS = {
    name: Peer(lambda model, windows: windows, partial(apply, method=method), settings)
    for name, method in METHODS.items()
}
