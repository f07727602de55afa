"""Whether two graphs compute the same function of the same inputs, parameter by parameter.

Values of both graphs get one number a distinct computation: equal numbers mean the same operations with the same
attributes on the same inputs and on parameters of the same types. Order of nodes, names and scopes do not count,
nor does the order of the operands of an addition or a product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import loads

COMMUTATIVE = frozenset({"add", "mul", "minimum", "maximum", "logical_and", "logical_or"})
CONSTANT_TOLERANCE = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Mismatch:
    """Why the graphs differ, in words."""

    reason: str


@dataclass
class _Numbering:
    """Numbers of values: the same number for the same computation, in any graph numbered with it."""

    known: dict[Any, int] = field(default_factory=dict[Any, int])

    def of_graph(self, graph: Graph) -> dict[Value, int]:
        numbers = {value: self._number(("input", name, str(value.type))) for name, value in graph.inputs.items()}
        for param in graph.params.values():
            numbers[param] = self._number(("param", str(param.type)))
        for node in graph.nodes:
            computation = self._number(_computation(node, numbers))
            for index, value in enumerate(node.outputs):
                numbers[value] = self._number(("output", computation, index))
        return numbers

    def _number(self, key: Any) -> int:
        return self.known.setdefault(key, len(self.known))


def _computation(node: Node, numbers: Mapping[Value, int]) -> tuple[Any, ...]:
    operands = [None if value is None else numbers[value] for value in node.inputs]
    if node.op.name in COMMUTATIVE and None not in operands:
        operands.sort(key=lambda number: number or 0)
    return (node.op.name, tuple(sorted(node.attrs.items())), tuple(operands))


def unify(target: Graph, ours: Graph) -> dict[str, Param] | Mismatch:
    """For every stored parameter of ``target`` the parameter of ``ours`` that plays its part, or why there is none.

    Parameters of ``target`` that no checkpoint holds (rotary tables) must have the same values in ``ours``.
    """
    numbering = _Numbering()
    theirs, own = numbering.of_graph(target), numbering.of_graph(ours)
    if target.outputs.keys() != ours.outputs.keys():
        return Mismatch(f"the outputs are {', '.join(target.outputs)} there and {', '.join(ours.outputs)} here")
    if any(theirs[value] != own[ours.outputs[name]] for name, value in target.outputs.items()):
        return Mismatch(_first_difference(target, theirs, ours, own))
    return _check_params(target, ours, _paired_params(target, theirs, ours, own))


def _paired_params(
    target: Graph, theirs: Mapping[Value, int], ours: Graph, own: Mapping[Value, int]
) -> dict[Param, list[Param]]:
    """Every parameter of ``target`` with those of ``ours`` that stand in its places."""
    paired: dict[Param, dict[Param, None]] = {}
    pending: list[tuple[Value, Value]] = [(value, ours.outputs[name]) for name, value in target.outputs.items()]
    seen: set[tuple[Value, Value]] = set()
    while pending:
        pair = pending.pop()
        if pair in seen:
            continue
        seen.add(pair)
        there, here = pair
        if isinstance(there, Param) and isinstance(here, Param):
            paired.setdefault(there, {})[here] = None
        elif there.node is not None and here.node is not None:
            pending += _paired_operands(there.node, here.node, theirs, own)
    return {there: list(here) for there, here in paired.items()}


def _paired_operands(
    there: Node, here: Node, theirs: Mapping[Value, int], own: Mapping[Value, int]
) -> list[tuple[Value, Value]]:
    left = [value for value in there.inputs if value is not None]
    right = [value for value in here.inputs if value is not None]
    swapped = there.op.name in COMMUTATIVE and [theirs[v] for v in left] != [own[v] for v in right]
    return list(zip(left, reversed(right) if swapped else right, strict=True))


def _check_params(target: Graph, ours: Graph, paired: Mapping[Param, list[Param]]) -> dict[str, Param] | Mismatch:
    found: dict[str, Param] = {}
    for param in target.params.values():
        partners = paired.get(param, [])
        if len(partners) > 1:
            names = " and ".join(sorted(partner.name for partner in partners))
            return Mismatch(f"{param.name} is one weight there; here {names} are different ones")
        if not partners:
            return Mismatch(f"{param.name} has no counterpart here")
        if param.persistent:
            found[param.name] = partners[0]
        elif not _same_constant(param, partners[0], ours):
            return Mismatch(f"the constants {param.name} there and {partners[0].name} here differ")
    return found


def _same_constant(there: Param, here: Param, ours: Graph) -> bool:
    """Equal up to the rounding of float32 arithmetic that made them."""
    if there.expr == here.expr:
        return True
    if loads([there.expr]):
        return False
    left, right = evaluate([there.expr], {})[0], evaluate([here.expr], ours.sources)[0]
    return left.shape == right.shape and torch.allclose(left.double(), right.double(), rtol=CONSTANT_TOLERANCE, atol=0)


def _first_difference(target: Graph, theirs: Mapping[Value, int], ours: Graph, own: Mapping[Value, int]) -> str:
    """The first operation of either graph that the other one lacks, in words, side by side."""
    there = next(_lacking(target, theirs, set(own.values())), None)
    here = next(_lacking(ours, own, set(theirs.values())), None)
    if there is None or here is None:
        longer, words = (here, "only this model") if there is None else (there, "only the target")
        return f"{words} has {_shown(longer)}" if longer else "the outputs are wired differently"
    if there.op is here.op:
        return f"{_located(here)} {_node_difference(there, here)}"
    return f"this model has {_shown(here)} where the target has {_shown(there)}"


def _lacking(graph: Graph, numbers: Mapping[Value, int], others: set[int]) -> Iterator[Node]:
    return (node for node in graph.nodes if any(numbers[value] not in others for value in node.outputs))


def _located(node: Node) -> str:
    return f"`{node.op.name}` in {node.scope or 'the model'}"


def _shown(node: Node) -> str:
    types = ", ".join("-" if value is None else str(value.type) for value in node.inputs)
    return f"{_located(node)} ({types})"


def _node_difference(there: Node, here: Node) -> str:
    for name in here.op.attrs:
        if there.attr(name) != here.attr(name):
            return f"has {name} {here.attr(name)}; the target's has {name} {there.attr(name)}"
    if len(there.inputs) != len(here.inputs):
        operands = here.op.operands.split()
        longer, whose = (here, "only here") if len(here.inputs) > len(there.inputs) else (there, "only in the target")
        extra = operands[min(len(there.inputs), len(here.inputs))].strip("?*")
        return f"has a {extra} {whose}: {longer.inputs[-1].type if longer.inputs[-1] else ''}".rstrip(": ")
    for left, right in zip(there.inputs, here.inputs, strict=True):
        if left is not None and right is not None and left.type != right.type:
            return f"reads {right.type}; the target's reads {left.type}"
    return "reads other values than the target's"
