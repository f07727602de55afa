"""What a graph is written as: a stock class where one holds it, otherwise a class generated from the graph."""

from __future__ import annotations

from typing import Literal

from backends.safetensors import Emission, Refusal, dtype_name, propose
from compiler.errors import TargetError
from compiler.ir.graph import Graph
from compiler.weights.ops.basic import cast

ModelClass = Literal["auto", "stock", "generated"]


def emission_of(graph: Graph, model_class: ModelClass = "auto", cache_bits: int | None = None) -> Emission:
    """The checkpoint for ``graph``, of a stock class or with its own code as ``model_class`` says. Reads no weight.

    ``cache_bits`` 8 or 4 rounds what latent attention caches, which stock classes cannot. Raises TargetError when there
    is no such checkpoint.
    """
    found = _stock(graph, model_class, cache_bits)
    if isinstance(found, Emission):
        return found
    if model_class == "stock":
        raise TargetError(
            _none(found.reason),
            remedy="leave out the pass that made it so, or let the checkpoint carry its own code (`class: auto`)",
        )
    return _generated(graph, found.reason, cache_bits or 0)


def _stock(graph: Graph, model_class: ModelClass, cache_bits: int | None) -> Emission | Refusal:
    if cache_bits is not None:
        return Refusal("", f"none caches latents in {cache_bits} bits")
    return Refusal("", "the recipe asks for generated code") if model_class == "generated" else propose(graph)


def _generated(graph: Graph, no_stock: str, cache_bits: int) -> Emission:
    from backends.torch_module import generate

    quantised = next((param.name for param in graph.params.values() if param.expr.op == "dequantize"), "")
    if quantised:
        raise TargetError(f"{quantised} is quantised, which generated code cannot load; and {_none(no_stock)}")
    try:
        made = generate(graph, cache_bits=cache_bits)
    except TargetError as error:
        raise TargetError(f"{error.cause}; and {_none(no_stock)}", where=error.where) from error
    config = {**made.config, "dtype": dtype_name(made.tensors.values())}
    tensors = {name: cast(param.expr, param.storage) for name, param in made.tensors.items()}
    return Emission("generated", made.architecture, config, tensors, (), made.files, no_stock)


def _none(no_stock: str) -> str:
    return f"no stock model class computes this: {no_stock}"
