"""Parameters in the form that the graph wants them, as expressions over the form that the checkpoint holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import count

from compiler.ir.graph import Graph, Param, Value
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import reshape, slice, transpose

_LAYOUT = ("reshape", "transpose", "slice")


def rebind(graph: Graph, param: Param, expr: Expr) -> Param:
    """Put a parameter of the same name that is made by ``expr`` in the place of ``param``."""
    names = list(graph.params)
    del graph.params[param.name]
    new = graph.add_param(param.name, expr, param.storage, aliases=param.aliases, persistent=param.persistent)
    graph.params = {name: graph.params[name] for name in names}
    graph.replace(param, new)
    return new


def part(graph: Graph, param: Param, index: int, expr: Expr) -> Param:
    """The parameter ``<name>.<index>`` that holds a part of ``param``, made once."""
    name = f"{param.name}.{index}"
    if name in graph.params:
        return graph.params[name]
    return graph.add_param(name, expr, param.storage, persistent=param.persistent)


def table(graph: Graph, param: Param, expr: Expr) -> Param:
    """A parameter ``<name>.table0`` that ``expr`` makes of ``param`` and maybe others, each different one another."""
    names = (f"{param.name}.table{number}" for number in count())
    name = next(name for name in names if name not in graph.params or graph.params[name].expr == expr)
    return graph.params[name] if name in graph.params else graph.add_param(name, expr, param.storage)


def of_parameter(value: Value) -> tuple[Param, Expr] | None:
    """The stored parameter that ``value`` is, or a part of another shape of it, and ``value`` as an expression."""
    if isinstance(value, Param):
        return (value, value.expr) if value.persistent else None
    node = value.node
    found = of_parameter(node.input(0)) if node is not None and node.op.name in _LAYOUT else None
    if node is None or found is None:
        return None
    param, expr = found
    if node.op.name == "reshape":
        return param, reshape(expr, [int(size) for size in value.shape])
    if node.op.name == "transpose":
        return param, transpose(expr, node.attr("perm"))
    if node.attr("step") != 1:
        return None
    return param, slice(expr, node.attr("axis"), node.attr("start"), node.attr("stop"))


def constant_values(param: Param) -> Sequence[float] | None:
    """The elements of a parameter that is written out in the graph, in row-major order."""
    return param.expr.attr("values") if param.expr.op == "literal" else None


def base_name(names: Collection[str], name: str) -> str:
    """The model's own parameter, one of ``names``, that ``name`` is or is a part of."""
    return name if name in names else name.rpartition(".")[0]


def order_params(graph: Graph, names: Iterable[str]) -> None:
    """Put parameters in the order in which the model lists ``names``, parts in place of the whole."""
    order = {name: position for position, name in enumerate(names)}
    ranked = sorted(graph.params.items(), key=lambda item: (order.get(base_name(order, item[0]), len(order)), item[0]))
    graph.params = dict(ranked)
