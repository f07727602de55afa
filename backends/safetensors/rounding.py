"""Rounded activations: taken out of a graph for a class that has none, and named in its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from backends.safetensors.unify import Mismatch
from compiler.ir.graph import Graph, Node, Param
from compiler.ir.layers import copy_of
from compiler.weights.expr import Expr, loads
from compiler.weights.ops.basic import literal


@dataclass(frozen=True)
class Rounding:
    """How what a matrix multiplies is rounded; ``scale`` 0 is one for each token."""

    type: str
    bits: int
    scale: float

    @property
    def kind(self) -> Rounding:
        """What all rounding that differs in its scale alone has in common."""
        return replace(self, scale=1.0 if self.scale else 0.0)

    def config(self) -> dict[str, Any]:
        """The ``input_activations`` entry of a compressed-tensors config group."""
        how = {"strategy": "tensor", "dynamic": False} if self.scale else {"strategy": "token", "dynamic": True}
        return {"num_bits": self.bits, "type": "int" if self.type == "int" else "float", "symmetric": True, **how}

    def tensors(self, name: str, weight: Expr) -> dict[str, Expr]:
        """What is stored beside the weight ``name``."""
        key = f"{name.removesuffix('weight')}input_scale"
        return {key: literal([self.scale], dtype=weight.dtype)} if self.scale else {}


def rounding_of(node: Node) -> Rounding:
    """What a ``fake_quantize`` does."""
    return Rounding(node.attr("type"), node.attr("bits"), node.attr("scale"))


def without_rounding(graph: Graph) -> tuple[Graph, dict[str, Rounding]]:
    """``graph`` with exact activations, and the rounding of what each weight of a linear map multiplies, by its name.

    What something else reads rounded stays in the graph, which no class then holds.
    """
    if not graph.nodes_named("fake_quantize"):
        return graph, {}
    plain, found = copy_of(graph), dict[str, Rounding]()
    for node in list(plain.nodes_named("fake_quantize")):
        readers = list(node.output.users)
        if not all(_multiplies(reader, node) for reader in readers):
            continue
        how = rounding_of(node)
        found.update({reader.input(1).name: how for reader in readers})
        plain.replace(node.output, node.input(0))
        plain.erase(node)
    return plain, found


def _multiplies(reader: Node, rounding: Node) -> bool:
    weight = reader.input(1) if reader.op.name == "linear" else None
    return isinstance(weight, Param) and reader.input(0) is rounding.output and len(weight.users) == 1


def by_module(
    target: Graph, found: Mapping[str, Param], rounded: Mapping[str, Rounding]
) -> dict[str, Rounding] | Mismatch:
    """``rounded``, by the names of our weights, by the names of tensors of ``target``'s module."""
    named: dict[str, set[Rounding | None]] = {}
    for name, param in found.items():
        for load in loads([target.params[name].expr]):
            named.setdefault(load.attr("key"), set()).add(rounded.get(param.name))
    odd = [name for name, ways in named.items() if len(ways) > 1]
    if odd:
        return Mismatch(f"parts of {odd[0]} multiply what is rounded in several ways")
    return {name: way for name, (way,) in named.items() if way is not None}
