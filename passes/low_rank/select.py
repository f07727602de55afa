"""What the selected weights can become: a place of its own kind, or nothing, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compiler.calibration.products import products
from compiler.errors import PassError
from compiler.ir.graph import Graph, Node, Param
from compiler.pipeline import Context
from passes.low_rank import experts, sparse
from passes.low_rank.experts import Stack
from passes.low_rank.forms import Structured
from passes.low_rank.places import Place
from passes.low_rank.sparse import DenseSparse
from passes.low_rank.tables import exposed, is_table
from passes.low_rank.train import Train
from passes.low_rank.tucker import Tucker, heads_of

STRUCTURED = ("tensor-train", "tucker", "sparse")


def places_of(graph: Graph, ctx: Context, params: Sequence[Param], form: str = "auto") -> list[Place]:
    """Those of ``params`` that can be factorised in ``form``, each a place; the others are reported as skipped.

    Tables are ``exposed`` in ``graph``. Raises PassError when there is no place.
    """
    known, heads = products(graph), heads_of(graph)
    found: list[Place] = []
    for param in params:
        reason = _obstacle(param, known.get(param, []))
        if not reason and form in STRUCTURED:
            reason = _unfit(param, form, heads)
        if reason:
            ctx.skipped(param.name, reason)
        else:
            found.append(_structured(param, form, heads) if form in STRUCTURED else _place(graph, param))
    if not found:
        raise PassError(
            "none of the selected weights can be factorised",
            option="where",
            remedy="`where: linear` selects the matrices that can be",
        )
    return found


def _place(graph: Graph, param: Param) -> Place:
    if is_table(param):
        return exposed(graph, param)
    return Stack((param,)) if _in_experts(param) else Place((param,))


def _unfit(param: Param, form: str, heads: Mapping[Param, Tucker]) -> str:
    """Why ``param``, which can be factorised, cannot be in a form of ``STRUCTURED``; "" when it can."""
    if any(node.op.name != "linear" or node.inputs.index(param) != 1 for node in param.users):
        return f"`form: {form}` is for linear maps"
    if form == "tucker" and param not in heads:
        return "it neither makes nor reads heads of attention"
    return sparse.obstacle(param) if form == "sparse" else ""


def _structured(param: Param, form: str, heads: Mapping[Param, Tucker]) -> Structured:
    match form:
        case "tucker":
            return heads[param]
        case "sparse":
            return DenseSparse((param,))
        case _:
            return Train((param,))


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
