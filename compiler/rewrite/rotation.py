"""Turn a residual stream: another basis of it, in which the model computes the same (SliceGPT, arXiv 2401.15024).

A root mean square norm without a scale commutes with rotations. So scales of norms go into what reads them, layer norms
become root mean squares once all that writes to the stream has no mean, and then whatever writes to the stream is
turned by Q, and whatever reads it by Q as well. Rewrites are lazy: no weight is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from compiler.errors import PassError
from compiler.ir.coupling import CouplingGroup
from compiler.ir.graph import Graph, Node, Param
from compiler.rewrite.stream import Stream, Use
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import add, cast, eye, full, matmul, mul, reshape, sub, transpose

Change = Callable[[Expr], Expr]


def turn(graph: Graph, group: CouplingGroup, basis: Expr) -> None:
    """Turn a stream whose norms have no scales by ``basis`` [n, n], float64 and orthogonal: x becomes x Q."""
    for param, axis in turned(graph, group):
        param.expr = _along(param.expr, axis, basis)


def turned(graph: Graph, group: CouplingGroup) -> list[tuple[Param, int]]:
    """The weights that ``turn`` turns, each with an axis along the stream."""
    stream = Stream.of(graph, group)
    return [*_writing(stream), *((use.param, use.axis) for use in stream.readers)]


def unscale(graph: Graph, group: CouplingGroup) -> dict[str, Param]:
    """Move the scales and shifts of a stream's norms into what reads them; what is computed stays the same.

    Heads that share the embedding's table get a matrix of their own: it is returned by the name of the table.
    Raises PassError where a scale stands between what writes to the stream and the stream, as after a second norm.
    """
    stream = Stream.of(graph, group)
    _check(stream)
    untied = _untie(graph, stream)
    stream = Stream.of(graph, group)
    readers = [*stream.readers, *(Use(node, param, 1) for node, param in _reading(stream, untied))]
    _fold_multipliers(stream)
    if any(node.op.name == "layer_norm" for node in stream.norms):
        _centre(stream)
    for node in stream.norms:
        _fold(graph, node, [use for use in readers if stream.part_in(use.node) == stream.part_out(node)])
    return untied


def _check(stream: Stream) -> None:
    made = [stream.part_out(node) for node in stream.norms]
    written = {stream.part_out(use.node) for use in stream.writers}
    names = {node.op.name for node in stream.norms}
    direct = [use for use in stream.readers if stream.part_in(use.node) not in made]
    reason = ""
    if not all(member.param.type.dtype.is_floating_point for member in stream.group.members):
        reason = "outputs are put in an order in it, as of pivoted factors: turn it before, or ask for pairs"
    elif stream.closed:
        reason = "an operation that is not linear stands in it"
    elif len(set(made)) < len(made) or written & set(made) or stream.normed & set(made):
        reason = "a norm writes to it, and its scale would have to be turned as well"
    elif len(names) > 1 or ("layer_norm" in names and direct):
        reason = "not all that reads it subtracts the mean"
    if reason:
        raise PassError(f"the residual stream cannot be turned: {reason}", option="rotate", remedy="leave `rotate` out")


def _untie(graph: Graph, stream: Stream) -> dict[str, Param]:
    """Give products that share a table a matrix of their own."""
    made: dict[str, Param] = {}
    for use in stream.readers:
        table = use.param
        if table in stream.part:
            name = next((alias for alias in table.aliases if alias not in graph.params), f"{table.name} as a head")
            if table.name not in made:
                made[table.name] = graph.add_param(name, table.expr, table.storage, dtype=table.type.dtype)
            graph.set_input(use.node, 1, made[table.name])
            table.aliases = tuple(alias for alias in table.aliases if alias != name)
    return made


def _reading(stream: Stream, untied: dict[str, Param]) -> Iterator[tuple[Node, Param]]:
    """The products of matrices that were untied: the group does not know these yet."""
    return ((node, param) for param in untied.values() for node in param.users if stream.part_in(node) is not None)


def _fold_multipliers(stream: Stream) -> None:
    """Let vectors that what is written gets multiplied by go into what writes it."""
    for node in stream.nodes:
        vector = next((v for v in node.inputs if isinstance(v, Param)), None) if node.op.name == "mul" else None
        if vector is None or node.output not in stream.part:
            continue
        multiplied = next(v for v in node.inputs if v is not None and v is not vector)
        users = [use for use in stream.writers if use.node is multiplied.node]
        if not users or len(multiplied.users) > 1 or any(len(use.param.users) > 1 for use in users):
            raise PassError(f"what `{vector.name}` multiplies is used otherwise too", option="rotate")
        for use in users:
            use.param.expr = _scaled(use.param.expr, use.axis, _wide(vector))
        vector.expr = full(vector.expr.shape, 1.0, vector.storage)


def _centre(stream: Stream) -> None:
    """Let nothing that is written have a mean: layer norms subtract it anyway."""
    size = stream.group.size
    matrix = sub(eye(size, torch.float64), full((size, size), 1 / size, torch.float64))
    for param, axis in _writing(stream):
        param.expr = _along(param.expr, axis, matrix)


def _writing(stream: Stream) -> list[tuple[Param, int]]:
    """Weights that write to the stream, tables and vectors that are in it, each with its axis."""
    tables = [(member.param, member.axis) for member in stream.group.members if member.param in stream.part]
    return [*((use.param, use.axis) for use in stream.writers), *tables]


def _fold(graph: Graph, node: Node, readers: list[Use]) -> None:
    """Move the scale and the shift of a norm into ``readers``; a layer norm becomes a root mean square."""
    weight, shift = node.optional_input(1), node.optional_input(2)
    for use in readers:
        if len(use.param.users) > 1:
            raise PassError(f"{use.param.name} is read behind several norms", option="rotate")
        if isinstance(shift, Param):
            _add_to_bias(graph, use, _wide(shift))
        if isinstance(weight, Param):
            use.param.expr = _scaled(use.param.expr, use.axis, _scale_of(node, weight))
    if isinstance(weight, Param):
        offset = node.attr("offset") if "offset" in node.op.attrs else 0.0
        weight.expr = full(weight.expr.shape, 1.0 - offset, weight.storage)
    if node.op.name == "layer_norm":
        made = graph.op("rms_norm", node.inputs[:2], {"eps": node.attr("eps")}, scope=node.scope, before=node)
        graph.replace(node.output, made)
        graph.erase(node)
        graph.prune()


def _scale_of(node: Node, weight: Param) -> Expr:
    offset = node.attr("offset") if "offset" in node.op.attrs else 0.0
    return add(_wide(weight), full(weight.expr.shape, offset, torch.float64)) if offset else _wide(weight)


def _add_to_bias(graph: Graph, use: Use, shift: Expr) -> None:
    """Add W shift to the bias of a linear map, which gets one if it has none."""
    if use.node.op.name != "linear":
        raise PassError(
            f"`{use.node.op.name}` reads behind a norm that shifts",
            option="rotate",
            remedy="leave `rotate` out",
        )
    bias = use.node.optional_input(2)
    more = reshape(matmul(_wide(use.param), reshape(shift, (-1, 1))), (-1,))
    if isinstance(bias, Param):
        bias.expr = add(_wide(bias), more)
        return
    name = f"{use.param.name.removesuffix('weight')}bias"
    made = graph.add_param(name, more, use.param.storage, dtype=use.param.type.dtype)
    use.node.inputs += [None] * (3 - len(use.node.inputs))
    graph.set_input(use.node, 2, made)


def _wide(param: Param) -> Expr:
    return cast(param.expr, torch.float64)


def _scaled(expr: Expr, axis: int, vector: Expr) -> Expr:
    """Every slice along ``axis`` times its entry of ``vector``."""
    shape = [1] * expr.type.rank
    shape[axis] = vector.type.numel
    return mul(cast(expr, torch.float64), reshape(vector, shape))


def _along(expr: Expr, axis: int, matrix: Expr) -> Expr:
    """The vectors along ``axis`` times ``matrix`` [n, n] from the right."""
    rank = expr.type.rank
    perm = [*(i for i in range(rank) if i != axis), axis]
    last = transpose(cast(expr, torch.float64), perm)
    made = reshape(matmul(reshape(last, (-1, last.shape[-1])), matrix), last.shape)
    return transpose(made, [perm.index(i) for i in range(rank)])
