"""Stacks of experts: one basis for what all experts read, and one for what all of them write.

Every expert's first matrix W_e [f, d] becomes U_e V with V [r, d] in common: the experts are what they were, on r
numbers of a token instead of d. Every expert's second matrix W_e [d, f] becomes V^T U_e^T: the experts write r numbers,
and one matrix makes d of their sum. Both are one shared basis; the second is that of the transposed matrices, for which
what weighs inputs and what weighs outputs change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from compiler.calibration.moments import Moments
from compiler.calibration.products import matrix_shape
from compiler.factor import Metric
from compiler.ir.graph import Graph, Node, Param
from compiler.pipeline import Context
from compiler.weights.ops.basic import transpose
from passes.low_rank.basis import Member
from passes.low_rank.metrics import Metrics
from passes.low_rank.places import Form, Place
from passes.low_rank.rewrite import Stored
from passes.low_rank.shared import Shared, again, rebound

GATE_UP, DOWN, DOWN_BIAS = 3, 4, 6  # operands of `experts`
FEW = 64  # tokens: an expert that calibration sent as many to is taken half for itself, half for the mean of all


class Stack(Shared):
    """The matrices [experts, rows, columns] of one operation, which ``params`` names."""

    @property
    def writes(self) -> bool:
        """Whether these are the experts' second matrices."""
        return _node(self.params[0]).input(DOWN) is self.params[0]

    @property
    def shape(self) -> tuple[int, int]:
        experts, rows, columns = matrix_shape(self.params[0])
        return (experts * columns, rows) if self.writes else (experts * rows, columns)

    @property
    def height(self) -> int:
        return self.shape[0]

    @cached_property
    def columns(self) -> int:
        return self.shape[1]

    @property
    def full(self) -> int:
        return self.params[0].type.numel

    @property
    def words(self) -> str:
        return f"one basis of what all experts {'write' if self.writes else 'read'}"

    @property
    def unbiased(self) -> int:
        return 0

    def members(self, metrics: Metrics) -> Iterator[Member]:
        stack, found = metrics.ctx.read(self.params[0]), _borrowed(metrics.statistics.of(self.params[0]))
        for index, weight in enumerate(stack):
            own = found.of_expert(index)
            left, right = metrics.left(own.gradient, len(weight)), metrics.right(own)
            turned = weight.double().T if self.writes else weight.double()
            yield Member(turned, Metric((right,), left) if self.writes else Metric((left,), right))

    def made(self, metrics: Metrics, first: Tensor, second: Sequence[Tensor]) -> Stored:
        stack = torch.stack(list(second))
        return self._kept(metrics.ctx, first, stack.transpose(1, 2) if self.writes else stack)

    def planned(self, ctx: Context, form: Form, rank: int) -> Stored:
        experts, rows, columns = ctx.read(self.params[0]).shape
        sizes = (experts, rank, columns) if self.writes else (experts, rows, rank)
        width = rows if self.writes else columns
        return self._kept(ctx, torch.empty(rank, width, device="meta"), torch.empty(sizes, device="meta"))

    def _kept(self, ctx: Context, first: Tensor, stack: Tensor) -> Stored:
        parts, storage = {"basis": first, "stack": stack.contiguous()}, self.params[0].storage
        return NarrowStack(*(ctx.spill(f"{self.name}.{name}", part.to(storage)) for name, part in parts.items()))


class NarrowStack(Stored):
    """``first`` is the basis V [r, d], ``second`` the stack on that side of it."""

    def write(self, graph: Graph, place: Place) -> None:
        assert isinstance(place, Stack)
        param, scope = graph.params[place.params[0].name], f"{place.name}_basis"
        node, side = _node(param), DOWN if place.writes else GATE_UP
        basis = graph.add_param(f"{scope}.weight", transpose(self.first) if place.writes else self.first)
        operands = list(node.inputs)
        operands[side] = rebound(graph, param, self.second)
        if place.writes:
            narrow = graph.op("experts", operands, node.attrs, scope=node.scope, before=node)
            graph.replace(node.output, graph.op("linear", [narrow, basis], scope=scope, before=node))
            graph.erase(node)
        else:
            operands[0] = graph.op("linear", [node.input(0), basis], scope=scope, before=node)
            again(graph, node, operands)
        graph.prune()


def obstacle(param: Param) -> str:
    """Why a stack of experts cannot have a basis; "" when it can."""
    if len(param.users) > 1:
        return "several operations read this stack of experts"
    node = _node(param)
    if param is node.input(DOWN) and node.optional_input(DOWN_BIAS) is not None:
        return "the experts add biases to what they write, which a basis of fewer numbers cannot hold"
    return "" if param in (node.input(GATE_UP), node.input(DOWN)) else "it is no matrix of the experts"


def _node(param: Param) -> Node:
    return next(iter(param.users))


def _borrowed(found: Moments) -> Moments:
    """``found`` with a part of the mean of all experts, the larger the fewer tokens an expert met."""
    own = found.count / (found.count + FEW)
    mean = torch.einsum("e,eij->ij", found.count / found.count.sum().clamp_min(1), found.second)
    second = own[:, None, None] * found.second + (1 - own)[:, None, None] * mean
    gradient = found.gradient
    if gradient is not None:
        part = own.reshape(-1, *(1 for _ in gradient.shape[1:]))
        gradient = part * gradient + (1 - part) * gradient.mean(0)
    return replace(found, second=second, gradient=gradient, mean=torch.zeros_like(found.mean))
