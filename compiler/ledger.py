"""What a graph costs: parameters, stored bytes, arithmetic and cache per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compiler.ir.graph import Graph, Param
from compiler.ir.layers import layer_of
from compiler.weights.ops.codec import is_quantised


@dataclass(frozen=True)
class Ledger:
    """``parameters`` counts logical elements, ``stored_bytes`` what their tensors take on disk.

    ``flops_per_token`` counts two per multiply-add of matrix products at one token; ``cache_bytes_per_token`` is
    the key/value cache of one more token of one sequence, in the model's own dtype.
    """

    parameters: int
    stored_bytes: int
    flops_per_token: int
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Matrix:
    """A stored parameter of two or more axes: what it takes on disk."""

    name: str
    shape: tuple[int, ...]
    stored_bytes: int


Bytes = Callable[[Param], int]


def measure(graph: Graph, bytes_of: Bytes | None = None) -> Ledger:
    """Take account of ``graph``; no weight is read. ``bytes_of`` is ``stored_bytes`` unless a format knows better."""
    from compiler.ir.facts import flops_per_token, kv_cache_values, model_dtype, parameter_count

    return Ledger(
        parameters=parameter_count(graph),
        stored_bytes=sum(map(bytes_of or stored_bytes, stored_params(graph))),
        flops_per_token=flops_per_token(graph),
        cache_bytes_per_token=kv_cache_values(graph) * model_dtype(graph).itemsize,
    )


def bytes_by_layer(graph: Graph, bytes_of: Bytes | None = None) -> dict[str, int]:
    """Stored bytes of every layer by its module path, in order; what is in no layer is under ""."""
    totals: dict[str, int] = {}
    for param in stored_params(graph):
        layer = layer_of(param.name)
        scope = layer.scope if layer and layer.scope != param.name else ""  # a numbered weight is no layer
        totals[scope] = totals.get(scope, 0) + (bytes_of or stored_bytes)(param)
    return totals


def matrices(graph: Graph, bytes_of: Bytes | None = None) -> list[Matrix]:
    """Every stored parameter of two or more axes, in order; no weight is read."""
    found = [param for param in stored_params(graph) if len(param.type.shape) > 1]
    return [Matrix(param.name, tuple(map(int, param.type.shape)), (bytes_of or stored_bytes)(param)) for param in found]


def stored_params(graph: Graph) -> list[Param]:
    """The parameters that an output file holds; tied weights once."""
    return [param for param in graph.params.values() if param.persistent]


def stored_bytes(param: Param) -> int:
    """Bytes of the tensors that hold ``param``: its parts when it is quantised, one dense tensor otherwise."""
    if is_quantised(param.expr):
        return sum(part.type.nbytes for part in param.expr.args)
    return param.type.with_dtype(param.storage).nbytes
