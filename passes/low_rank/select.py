"""What the selected weights can become: a place of its own kind, or nothing, and why."""

from __future__ import annotations

from collections.abc import Sequence

from compiler.calibration.products import products
from compiler.errors import PassError
from compiler.ir.graph import Graph, Node, Param
from compiler.pipeline import Context
from passes.low_rank import experts
from passes.low_rank.experts import Stack
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
        if reason:
            ctx.skipped(param.name, reason)
        else:
            found.append(_place(graph, param))
    if not found:
        raise PassError("none of the selected weights can be factorised", option="where")
    return found


def _place(graph: Graph, param: Param) -> Place:
    if is_table(param):
        return exposed(graph, param)
    return Stack((param,)) if _in_experts(param) else Place((param,))


def _in_experts(param: Param) -> bool:
    return any(node.op.name == "experts" for node in param.users)


def _obstacle(param: Param, users: Sequence[Node]) -> str:
    """Why ``param`` cannot be factorised; "" when it can."""
    if is_table(param):
        return ""
    if _in_experts(param):
        return experts.obstacle(param)
    if len(users) != len(param.users):
        kinds = sorted({node.op.name for node in param.users if node not in users})
        return f"it is read by {', '.join(kinds)} as well" if users else f"it is read by {', '.join(kinds)}"
    biases = {node.optional_input(2) for node in users}
    if len(biases) > 1 or not all(bias is None or isinstance(bias, Param) for bias in biases):
        return "its products have different biases"
    return ""
