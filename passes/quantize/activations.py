"""What quantised matrices multiply, and what attention caches, rounded as runtimes round it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from compiler.calibration.sweep import sweep
from compiler.errors import PassError
from compiler.ir.facts import model_dtype
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.pipeline import Context

Activations = Literal["none", "int8", "fp8"]
LARGEST = {"int8": 127.5, "fp8": 448.0}
CACHED = (1, 2)  # operands of attention: keys, values
PLANNED_SCALE = 1.0  # stands for what calibration will show


def round_inputs(graph: Graph, ctx: Context, params: Sequence[Param], kind: Activations, *, static: bool) -> None:
    """Put a ``fake_quantize`` before every linear map of ``params``; one for all that read the same value.

    Its scale is that of each token, or, ``static``, the least that clips nothing of the calibration data.
    """
    readers = _readers(graph, ctx, params)
    largest = _largest(graph, ctx, readers) if static else {}
    for x, nodes in readers.items():
        options = _type(kind)
        if static:
            weight = nodes[0].input(1)
            dtype = weight.storage if isinstance(weight, Param) else model_dtype(graph)
            options["scale"] = _scale(largest.get(x), kind, dtype)
        scope = nodes[0].scope.rpartition(".")[0]
        rounded = graph.op("fake_quantize", [x], options, scope=scope, before=nodes[0])
        for node in nodes:
            graph.set_input(node, 0, rounded)


def round_cache(graph: Graph, ctx: Context, kind: Activations) -> None:
    """Round keys and values of causal attention, with the least scales that clip nothing of the calibration data.

    Raises PassError when no attention caches any.
    """
    places = [(node, operand) for node in graph.nodes_named("attention") if node.attr("causal") for operand in CACHED]
    if not places:
        raise PassError("no attention of the model caches keys and values", option="cache", remedy="leave `cache` out")
    largest = _largest(graph, ctx, {node.input(operand) for node, operand in places})
    rounded: dict[Value, Value] = {}
    for node, operand in places:
        x = node.input(operand)
        if x not in rounded:
            options = {**_type(kind), "scale": _scale(largest.get(x), kind, model_dtype(graph))}
            rounded[x] = graph.op("fake_quantize", [x], options, scope=node.scope, before=node)
        graph.set_input(node, operand, rounded[x])


def _type(kind: Activations) -> dict[str, Any]:
    return {"type": "int" if kind == "int8" else kind}


def _readers(graph: Graph, ctx: Context, params: Sequence[Param]) -> dict[Value, list[Node]]:
    """The linear maps of ``params`` by what they multiply, in order; other readers are reported."""
    found: dict[Value, list[Node]] = {}
    chosen = set(params)
    for node in graph.nodes:
        for param in [value for value in node.inputs if isinstance(value, Param) and value in chosen]:
            reason = _obstacle(node)
            if reason:
                ctx.skipped(param.name, reason)
            else:
                found.setdefault(node.input(0), []).append(node)
    return found


def _obstacle(node: Node) -> str:
    """Why what ``node`` reads is not rounded; "" when it is."""
    if node.op.name != "linear":
        return f"its inputs stay as they are: it is read by `{node.op.name}`"
    return "" if node.input(0).type.rank == 3 else "its inputs stay as they are: they are not one vector a token"


def _largest(graph: Graph, ctx: Context, values: Collection[Value]) -> Mapping[Value, float]:
    """The largest magnitude that each of ``values`` has on the calibration data; none in a planned run."""
    batches = ctx.calibration()
    found: dict[Value, float] = {}

    def see(value: Value, tensor: Tensor) -> None:
        if value in values:
            found[value] = max(found.get(value, 0.0), float(tensor.abs().amax()))

    for stage in sweep(graph, batches, exact=True) if batches else ():
        stage.observe(see)
    return found


def _scale(largest: float | None, kind: Activations, dtype: torch.dtype) -> float:
    """The scale as files hold it, in ``dtype``."""
    scale = PLANNED_SCALE if largest is None else largest / LARGEST[kind]
    return float(torch.tensor(scale).to(dtype).clamp(min=torch.finfo(dtype).tiny))
