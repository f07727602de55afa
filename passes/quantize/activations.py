"""What quantised matrices multiply, rounded as runtimes with integer or FP8 products round it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.pipeline import Context

Activations = Literal["none", "int8", "fp8"]


def round_inputs(
    graph: Graph, ctx: Context, params: Sequence[Param], kind: Activations, scales: Mapping[Param, float] | None = None
) -> None:
    """Put a ``fake_quantize`` before every linear map of ``params``; one for all that read the same value.

    With ``scales``, which weights of one input share, it has that scale, else one for each token.
    """
    chosen, rounded = set(params), dict[Value, Value]()
    for node in list(graph.nodes):
        for param in [value for value in node.inputs if isinstance(value, Param) and value in chosen]:
            reason = _obstacle(node)
            if reason:
                ctx.skipped(param.name, reason)
                continue
            x = node.input(0)
            if x not in rounded:
                options: dict[str, Any] = {"type": "int" if kind == "int8" else kind}
                options |= {} if scales is None else {"scale": scales[param]}
                scope = node.scope.rpartition(".")[0]
                rounded[x] = graph.op("fake_quantize", [x], options, scope=scope, before=node)
            graph.set_input(node, 0, rounded[x])


def _obstacle(node: Node) -> str:
    """Why what ``node`` reads is not rounded; "" when it is."""
    if node.op.name != "linear":
        return f"its inputs stay as they are: it is read by `{node.op.name}`"
    return "" if node.input(0).type.rank == 3 else "its inputs stay as they are: they are not one vector a token"
