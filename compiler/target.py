"""What a graph is written as: a stock class where one holds it, otherwise a class generated from the graph."""

from __future__ import annotations

from typing import Literal

from backends.safetensors import Emission, Refusal, propose
from compiler.errors import TargetError
from compiler.ir.graph import Graph, Param
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import cast

ModelClass = Literal["auto", "stock", "generated"]


def emission_of(graph: Graph, model_class: ModelClass = "auto") -> Emission:
    """The checkpoint for ``graph``, of a stock class or with its own code as ``model_class`` says. Reads no weight.

    Raises TargetError when there is none.
    """
    found = Refusal("", "the recipe asks for generated code") if model_class == "generated" else propose(graph)
    if isinstance(found, Emission):
        return found
    if model_class == "stock":
        raise TargetError(
            f"no stock model class computes this: {found.reason}",
            remedy="leave out the pass that made it so, or let the checkpoint carry its own code: `class: auto`",
        )
    return _generated(graph, found)


def _generated(graph: Graph, refusal: Refusal) -> Emission:
    from backends.torch_module import generate

    made = generate(graph)
    tensors = {name: stored(param) for name, param in made.tensors.items()}
    return Emission("generated", made.architecture, made.config, tensors, (), made.files, refusal.reason)


def stored(param: Param) -> Expr:
    """A parameter as it is written."""
    return cast(param.expr, param.storage)
