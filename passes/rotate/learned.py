"""A stream's matrix learned: on calibration data, so that the model with rounded weights is near to the original.

Matrices of the layers that read the stream or write to it are rounded to nearest, in the basis that the stream has, and
the loss is the distance of what the model then computes from what it did. Gradients pass rounding as if it did
nothing, which yields that by the basis Q. Each step is a Cayley transform of a skew matrix A,

    Q <- (1 + A / 2)^-1 (1 - A / 2) Q,

so that Q stays orthogonal (SpinQuant, arXiv 2405.16406). A is the mean of the last steps' G Q^T - Q G^T, G being the
gradient, brought to a size that falls to zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.calibration.distil.whole import Pair
from compiler.calibration.distil.windows import divide, merged, order
from compiler.calibration.fidelity import Fidelity, spread
from compiler.calibration.moments import key_of
from compiler.errors import PassError
from compiler.ir.coupling import CouplingGroup
from compiler.ir.graph import Graph, Param
from compiler.ir.layers import copy_of, layer_of
from compiler.pipeline import Context
from compiler.rewrite.rotation import turn, turned
from compiler.weights.expr import Expr
from compiler.weights.ops.integer import Integer

if TYPE_CHECKING:
    from passes.rotate import Rotate

Batches = Sequence[Mapping[str, Tensor]]
StreamOf = Callable[[Graph], CouplingGroup]

TOKENS = 16384  # of calibration data, held-out windows included
STEP_TOKENS = 1024
MOMENTUM = 0.9
RATE = 0.02  # the root mean square, over coordinates, of the angle that the first step turns by
SAVE_SECONDS = 60.0


@dataclass
class _Turned:
    """A weight, its ``axes`` along the stream, and the codec that rounds it, if any; ``basis`` is float32 [n, n]."""

    weight: Tensor
    axes: Sequence[int]
    codec: Integer | None
    basis: Tensor

    def value(self) -> Tensor:
        """The weight in the basis, rounded: a tensor of which gradients can be taken."""
        moved = self._along(self.axes)
        return (moved if self.codec is None else _rounded(moved, self.codec)).requires_grad_()

    def slope(self, gradient: Tensor) -> Tensor:
        """By the basis, from the gradient by the weight."""
        found = torch.zeros_like(self.basis)
        for axis in self.axes:
            before = self._along([other for other in self.axes if other != axis])
            found += _vectors(before, axis).T @ _vectors(gradient, axis)
        return found

    def _along(self, axes: Sequence[int]) -> Tensor:
        weight = self.weight
        for axis in axes:
            weight = (weight.movedim(axis, -1) @ self.basis).movedim(-1, axis)
        return weight.contiguous()


def _vectors(weight: Tensor, axis: int) -> Tensor:
    return weight.movedim(axis, -1).reshape(-1, weight.shape[axis])


def _rounded(weight: Tensor, codec: Integer) -> Tensor:
    grouped = weight.reshape(-1, weight.shape[-1] // (codec.group or weight.shape[-1]), codec.group or weight.shape[-1])
    parameters = codec.fit(grouped)
    return codec.decode(codec.encode(grouped, parameters), parameters).reshape(weight.shape)


def learned_basis(
    graph: Graph, original: Graph, ctx: Context, stream_of: StreamOf, batches: Batches, start: Tensor, wanted: Rotate
) -> Tensor:
    """A matrix for a stream of ``graph`` whose norms have no scales: ``start``, or what was learned if that is nearer.

    ``original`` computes what ``graph`` does. Matrices are float64 [n, n]. Raises PassError when ``wanted.group``
    does not divide every width, or when there are fewer than two windows of calibration data.
    """
    windows = divide(spread(batches, TOKENS))
    axes: dict[Param, list[int]] = {}
    for param, axis in turned(graph, stream_of(graph)):
        axes.setdefault(param, []).append(axis)
    codecs = codecs_of(axes, wanted)
    parts = {param: _Turned(ctx.read(param).float(), own, codecs[param], start.float()) for param, own in axes.items()}
    model = key_of(graph, axes, [*windows.train, *windows.held], (), wanted.seed)
    key = f"rotation-{model}-{wanted.learn}-{wanted.bits}-{wanted.group}"
    found = _learned(
        ctx, Pair(original, graph, list(parts)), parts, merged(graph, windows.train, STEP_TOKENS), start, wanted, key
    )
    fidelity = Fidelity(original, windows.held)
    distances = [
        fidelity.distance(_trial(graph, stream_of, codecs, ctx.spill(f"rotation.{name}.{len(start)}", own)))
        for name, own in (("before", start), ("learned", found))
    ]
    nearer = distances[1] < distances[0]
    ctx.tried("rounded in the basis of Hadamard's matrix", distances[0], not nearer)
    ctx.tried(f"rounded in a basis learned in {wanted.learn} steps", distances[1], nearer)
    return found if nearer else start


def codecs_of(params: Iterable[Param], wanted: Rotate) -> dict[Param, Integer | None]:
    """How each of ``params`` is rounded; None where it is not. Raises PassError when ``wanted.group`` does not divide a
    width."""
    return {param: _codec(param, wanted) for param in params}


def _codec(param: Param, wanted: Rotate) -> Integer | None:
    """How ``param`` is rounded: as a matrix of a layer; None where it is none."""
    products = all(node.op.name in ("linear", "experts") and layer_of(node.scope) for node in param.users)
    if not products or param.type.rank < 2:
        return None
    width = param.type.static_shape[-1]
    if wanted.group and width % wanted.group:
        cause = f"groups of {wanted.group} do not divide {width}, the input width of {param.name}"
        raise PassError(cause, option="group", remedy="give the group of the `quantize` that follows; 0 is a whole row")
    return Integer(wanted.bits, wanted.group, torch.float32, search=False)


def _trial(graph: Graph, stream_of: StreamOf, codecs: Mapping[Param, Integer | None], basis: Expr) -> Graph:
    """``graph`` in ``basis``, its matrices rounded."""
    trial = copy_of(graph)
    turn(trial, stream_of(trial), basis)
    for param, codec in codecs.items():
        twin = trial.params[param.name]
        twin.expr = twin.expr if codec is None else codec.nearest(twin.expr)
    return trial


def _learned(
    ctx: Context,
    pair: Pair,
    parts: Mapping[Param, _Turned],
    train: Batches,
    start: Tensor,
    wanted: Rotate,
    key: str,
) -> Tensor:
    """``start`` after all steps. What an interrupted run has learned is gone on from."""
    state = ctx.progress.load(key) or {"basis": start, "mean": torch.zeros_like(start), "done": torch.tensor(0)}
    basis, mean = state["basis"].clone(), state["mean"].clone()
    saved = time.perf_counter()
    turns = order(len(train), wanted.learn, wanted.seed)
    for step in range(int(state["done"]), wanted.learn):
        for part in parts.values():
            part.basis = basis.float()
        gradients = pair.gradients(list(parts.values()), [train[turns[step]]])
        slopes = (part.slope(gradient) for part, gradient in zip(parts.values(), gradients, strict=True))
        turning = sum(slopes, torch.zeros_like(basis)) @ basis.T
        mean.lerp_(turning - turning.T, 1 - MOMENTUM)
        basis = stepped(basis, mean, RATE * (1 - step / wanted.learn))
        if time.perf_counter() - saved > SAVE_SECONDS:
            saved = time.perf_counter()
            ctx.progress.save(key, {"basis": basis, "mean": mean, "done": torch.tensor(step + 1)})
    return basis


def stepped(basis: Tensor, skew: Tensor, angle: float) -> Tensor:
    """``basis`` [n, n] turned against ``skew`` by ``angle``, the root mean square over coordinates."""
    size = float(skew.norm())
    if not size:
        return basis
    half = skew * (angle * len(skew) ** 0.5 / size / 2)
    one = torch.eye(len(skew), dtype=skew.dtype)
    return torch.linalg.solve(one + half, (one - half) @ basis)
