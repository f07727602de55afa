"""Layers are numbered from 0 on where they are built: what is left of a stack gets new numbers."""

from __future__ import annotations

from compiler.ir.graph import Graph
from compiler.ir.layers import Layer, layer_of


def close_gaps(graph: Graph) -> None:
    """Number the layers of every stack of ``graph`` from 0 on, in their order, in scopes and in names of weights.

    Left as it is where a weight of a layer that is gone would then have the name of another.
    """
    stacks: dict[str, set[int]] = {}
    for layer in (layer_of(node.scope) for node in graph.nodes):
        if layer is not None:
            stacks.setdefault(layer.stack, set()).add(layer.index)
    new = {Layer(stack, old): Layer(stack, i) for stack, own in stacks.items() for i, old in enumerate(sorted(own))}
    names = [_renamed(name, new) for param in graph.params.values() for name in (param.name, *param.aliases)]
    if all(old == now for old, now in new.items()) or len({*names}) < len(names):
        return
    for node in graph.nodes:
        node.scope = _renamed(node.scope, new)
    for param in graph.params.values():
        param.name, param.aliases = _renamed(param.name, new), tuple(_renamed(name, new) for name in param.aliases)
    graph.params = {param.name: param for param in graph.params.values()}


def _renamed(path: str, new: dict[Layer, Layer]) -> str:
    layer = layer_of(path)
    return path if layer is None or layer not in new else new[layer].scope + path.removeprefix(layer.scope)
