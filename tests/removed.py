"""What tests of pruning share: graphs in float64, and groups with an index at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compiler.ir.coupling import CouplingGroup
from compiler.ir.execute import run
from compiler.ir.graph import Graph, Param
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import load
from compiler.weights.source import MemorySource


def double(graph: Graph) -> Graph:
    """Let ``graph`` compute in float64."""
    for param in graph.params.values():
        if param.storage.is_floating_point:
            param.type, param.storage = param.type.with_dtype(torch.float64), torch.float64
    for value in graph.inputs.values():
        if value.type.dtype.is_floating_point:
            value.type = value.type.with_dtype(torch.float64)
    for node in graph.nodes:
        if "dtype" in node.op.attrs:
            node.attrs = {**node.attrs, "dtype": _wide(node.attr("dtype"))}
        types = node.op.infer_types([x and x.type for x in node.inputs], node.attrs)
        for x, type in zip(node.outputs, types, strict=True):
            x.type = type
    return graph


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else dtype


def outputs(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return run(graph, {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})


def zero(graph: Graph, group: CouplingGroup, kept: Sequence[int]) -> None:
    """Set the indices of ``group`` that are not ``kept`` to zero in every member."""
    for member in group.members:
        size = member.param.type.static_shape[member.axis]
        mask = torch.tensor([(p // member.stride) % group.size in kept for p in range(size)])
        set_value(graph, member.param, value(graph, member.param).movedim(member.axis, -1).mul(mask), member.axis)


def value(graph: Graph, param: Param) -> Tensor:
    return evaluate([param.expr], graph.sources)[0]


def set_value(graph: Graph, param: Param, tensor: Tensor, axis: int = -1) -> None:
    source = MemorySource({"value": tensor.movedim(-1, axis).contiguous()})
    name = f"{param.name} {len(graph.sources)}"
    graph.sources[name] = source
    param.expr = load(name, "value", source.types["value"])
