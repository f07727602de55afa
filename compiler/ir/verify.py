"""The invariants of a graph, checked after capture, after every pass and after parsing a text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain

from compiler.errors import CompressError, VerifyError
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.ops import op_named
from compiler.ir.types import TensorType


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives: the names and types of its inputs and outputs, in order."""

    inputs: tuple[tuple[str, TensorType], ...]
    outputs: tuple[tuple[str, TensorType], ...]


def signature(graph: Graph) -> Signature:
    """The present signature of ``graph``, to compare with later."""
    return Signature(
        tuple((name, value.type) for name, value in graph.inputs.items()),
        tuple((name, value.type) for name, value in graph.outputs.items()),
    )


def verify(graph: Graph, expected: Signature | None = None) -> None:
    """Check every invariant of ``graph``; with ``expected``, also that inputs and outputs are those.

    Raises VerifyError naming the node and its scope.
    """
    known: set[Value] = {*graph.inputs.values(), *graph.params.values()}
    for node in graph.nodes:
        _check_operands(node, known)
        _check_types(node)
        known.update(node.outputs)
    _check_uses(graph, known)
    _check_names(graph)
    for param in graph.params.values():
        _check_param(param)
    for name, value in graph.outputs.items():
        _require(value in known, f"output `{name}` is not a value of the graph")
    if expected is not None:
        _check_signature(signature(graph), expected)


def _require(holds: bool, cause: str, node: Node | None = None) -> None:
    if not holds:
        raise VerifyError(cause if node is None else f"{_label(node)} {cause}", where=node.scope if node else "")


def _label(node: Node) -> str:
    return f"`{node.op.name}` in `{node.scope}`"


def _check_operands(node: Node, known: set[Value]) -> None:
    for index, value in enumerate(node.inputs):
        if value is None or value in known:
            continue
        origin = _label(value.node) if value.node else f"`{value.name}`"
        _require(False, f"reads operand {index} before it is defined: {origin} does not come earlier", node)
    for output in node.outputs:
        _require(output.node is node, "has an output that names another node as its origin", node)
        _require(output not in known, "has an output that another node has too", node)


def _check_types(node: Node) -> None:
    try:
        _require(op_named(node.op.name) is node.op, "is not the operation of that name", node)
        _require(node.op.normalise_attrs(node.attrs) == node.attrs, "keeps attributes at their default", node)
        types = node.op.infer_types([v and v.type for v in node.inputs], node.attrs, node.scope)
    except VerifyError:
        raise
    except CompressError as reason:
        raise VerifyError(f"{_label(node)}: {reason.cause}", where=node.scope) from reason
    found = [output.type for output in node.outputs]
    shown = [", ".join(map(str, some)) for some in (found, types)]
    _require(found == types, f"has type {shown[0]}, but its operands give {shown[1]}", node)


def _check_uses(graph: Graph, known: set[Value]) -> None:
    uses: dict[Value, Counter[Node]] = {value: Counter() for value in known}
    for node in graph.nodes:
        for value in node.inputs:
            if value is not None:
                uses[value][node] += 1
    for value, expected in uses.items():
        if value.users != expected:
            scopes = ", ".join(f"`{node.scope}`" for node in (*value.users, *expected)) or "none"
            raise VerifyError(f"the use list of `{value.name or value.type}` is wrong", where=f"users in {scopes}")


def _check_names(graph: Graph) -> None:
    for name, value in chain(graph.inputs.items(), graph.params.items()):
        _require(value.name == name, f"`{value.name}` is filed under the name `{name}`")
    names = chain(graph.inputs, graph.params, *(param.aliases for param in graph.params.values()))
    repeated = [name for name, count in Counter(names).items() if count > 1]
    _require(not repeated, f"the name `{repeated[0] if repeated else ''}` is given twice")


def _check_param(param: Param) -> None:
    _require(
        param.expr.type.shape == param.type.shape,
        f"parameter `{param.name}` is {param.type}, but its expression makes {param.expr.type}",
    )
    _require(
        all(isinstance(dim, int) for dim in param.type.shape),
        f"parameter `{param.name}` has symbolic dims: {param.type}",
    )


def _check_signature(found: Signature, expected: Signature) -> None:
    for kind, now, before in (
        ("inputs", found.inputs, expected.inputs),
        ("outputs", found.outputs, expected.outputs),
    ):
        shown = [", ".join(f"{name}: {type}" for name, type in some) for some in (now, before)]
        _require(now == before, f"the {kind} of the graph changed from ({shown[1]}) to ({shown[0]})")
