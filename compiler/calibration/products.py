"""Products with weights: where a weight multiplies vectors, and which vectors those are.

A linear map multiplies what enters it. A convolution multiplies patches: its kernel is a matrix [out, in * window].
Experts are a stack of matrices, each of which multiplies the tokens that are routed to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from compiler.ir.execute import read_param
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.ops.experts import gate

Known = Mapping[Value, Tensor]
Rows = Iterator[tuple[int, Tensor]]
"""The number of an expert (0 where there are none) and vectors [n, width]."""


def products(graph: Graph) -> dict[Param, list[Node]]:
    """The linear maps, convolutions of one group, and experts that multiply each weight."""
    found: dict[Param, list[Node]] = {}
    for node in graph.nodes_named("linear", "conv", "experts"):
        for index in (3, 4) if node.op.name == "experts" else (1,):
            weight = node.inputs[index]
            if isinstance(weight, Param) and _simple(node):
                found.setdefault(weight, []).append(node)
    return found


def _simple(node: Node) -> bool:
    return node.op.name != "conv" or (node.attr("groups") == 1 and node.input(0).type.rank <= 4)


def matrix_shape(param: Param) -> tuple[int, int, int]:
    """(experts, rows, columns) of a weight as matrices; one expert where there is no stack."""
    shape = param.expr.shape
    if any(node.op.name == "experts" for node in param.users):
        return shape[0], shape[1], shape[2]
    return 1, shape[0], param.type.numel // shape[0]


def reads(node: Node) -> tuple[Value, ...]:
    """What must be known to tell which vectors a product with ``node`` meets."""
    return tuple(map(node.input, range(3))) if node.op.name == "experts" else (node.input(0),)


def entering(node: Node, param: Param, known: Known) -> Rows:
    """The vectors that ``param`` multiplies in ``node``, given ``reads(node)`` and, for experts, the weights."""
    x = known[node.input(0)]
    match node.op.name:
        case "linear":
            yield 0, x.reshape(-1, x.shape[-1])
        case "conv":
            yield 0, _patches(node, x)
        case _:
            for expert, token, _ in routed(known[node.input(1)]):
                rows = x[token]
                yield expert, rows if param is node.input(3) else _activated(node, _widened(node, rows, expert, known))


def leaving(node: Node, param: Param, gradient: Tensor, known: Known) -> Rows:
    """The gradients at what ``param`` yields in ``node``, from that at the node's output."""
    match node.op.name:
        case "linear":
            yield 0, gradient.reshape(-1, gradient.shape[-1])
        case "conv":
            yield 0, gradient.movedim(1, -1).flatten(0, -2)
        case _:
            weights = known[node.input(2)]
            for expert, token, slot in routed(known[node.input(1)]):
                down = gradient[token] * weights[token, slot, None]
                yield expert, down if param is node.input(4) else _back(node, down, token, expert, known)


def routed(indices: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every expert that ``indices`` [N, K] name, with its tokens and the slots they have it in."""
    for expert in indices.unique().tolist():
        token, slot = torch.where(indices == expert)
        yield int(expert), token, slot


def _back(node: Node, down: Tensor, token: Tensor, expert: int, known: Known) -> Tensor:
    """The gradient at what the first matrix of an expert yields, from that at its output."""
    with torch.enable_grad():
        wide = _widened(node, known[node.input(0)][token], expert, known).detach().requires_grad_()
        (found,) = torch.autograd.grad(_activated(node, wide), wide, down @ known[node.input(4)][expert])
    return found


def _widened(node: Node, rows: Tensor, expert: int, known: Known) -> Tensor:
    bias = node.optional_input(5)
    return F.linear(rows, known[node.input(3)][expert], None if bias is None else known[bias][expert])


def _activated(node: Node, wide: Tensor) -> Tensor:
    return gate(wide, node.attr("activation"), node.attr("alpha"), node.attr("limit"))


def _patches(node: Node, x: Tensor) -> Tensor:
    """The patches [n, channels * window] of x [B, C, W] or [B, C, H, W]."""
    window = tuple(int(size) for size in node.input(1).shape[2:])
    stride, padding, dilation = (tuple(node.attr(name)) for name in ("stride", "padding", "dilation"))
    if len(window) == 1:
        x, window = x[:, :, None], (1, *window)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    return F.unfold(x, window, dilation, padding, stride).transpose(1, 2).flatten(0, 1)


def expert_weights(graph: Graph, nodes: Sequence[Node]) -> dict[Value, Tensor]:
    """The values of the weights of experts, without which what goes on inside of them is not known."""
    read = (value for node in nodes if node.op.name == "experts" for value in node.inputs[3:])
    return {value: read_param(graph, value) for value in read if isinstance(value, Param)}
