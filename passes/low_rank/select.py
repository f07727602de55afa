"""What the selected weights can become: a place of its own kind, or nothing, and why."""

from __future__ import annotations

from collections.abc import Sequence

from compiler.errors import PassError
from compiler.ir.graph import Graph, Node, Param
from compiler.pipeline import Context
from compiler.products import products
from passes.low_rank.places import Place
from passes.low_rank.tables import exposed, is_table


def places_of(graph: Graph, ctx: Context, params: Sequence[Param]) -> list[Place]:
    """Those of ``params`` that can be factorised, each a place; the others are reported as skipped.

    Tables are ``exposed`` in ``graph``. Raises PassError when there is no place.
    """
    known = products(graph)
    found: list[Place] = []
    for param in params:
        reason = _obstacle(param, known.get(param, []))
        if is_table(param):
            found.append(exposed(graph, param))
        elif reason:
            ctx.skipped(param.name, reason)
        else:
            found.append(Place((param,)))
    if not found:
        raise PassError("none of the selected weights can be factorised", option="where")
    return found


def _obstacle(param: Param, users: Sequence[Node]) -> str:
    """Why ``param`` cannot be factorised; "" when it can."""
    if any(node.op.name == "experts" for node in param.users):
        return "it is a stack of experts, which are one operation with dense weights"
    if len(users) != len(param.users):
        kinds = sorted({node.op.name for node in param.users if node not in users})
        return f"it is read by {', '.join(kinds)} as well" if users else f"it is read by {', '.join(kinds)}"
    biases = {node.optional_input(2) for node in users}
    if len(biases) > 1 or not all(bias is None or isinstance(bias, Param) for bias in biases):
        return "its products have different biases"
    return ""
