"""Graphs that round activations to codes: what they are without that, and how far two computations of one may be apart.

A token's largest |x| over its own scale is half the span of codes, 127.5: half-way between two. Where that element is
negative, the last bit of a sum decides between -128 and -127, in about one token of a hundred. Code by code a
computation in another order of sums is the same; its outputs are as far from the graph's as codes are from exact
values, not as far as rounding of sums.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of

LEAST, TIMES = 2.0**-6, 4


def rounds_activations(graph: Graph) -> bool:
    """Whether any is."""
    return bool(graph.nodes_named("fake_quantize"))


def without_rounding(graph: Graph) -> Graph:
    """A copy of ``graph`` that takes activations as they are."""
    copy = copy_of(graph)
    for node in copy.nodes_named("fake_quantize"):
        copy.replace(node.output, node.input(0))
    copy.prune()
    return copy


def widest(graph: Graph) -> float:
    """How far rounding may move an output at all, over the largest one: far less than any mistake makes, and a hundred
    times what a sum of such errors is expected to be, where no token is sent to other experts by it."""
    return 0.9 if graph.nodes_named("topk") else 0.25


def other_codes(graph: Graph, outputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """How far another computation may be from ``outputs`` of ``graph``, over the largest value of each output.

    ``exact`` are those without rounding. Two roundings of one model are about equally far from it, so at most twice
    that from each other; ``TIMES`` leaves room for chance.
    """
    moved = max(float((outputs[name] - value).abs().max() / value.abs().max()) for name, value in exact.items())
    return min(max(TIMES * moved, LEAST), widest(graph))
