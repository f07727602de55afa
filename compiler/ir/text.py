"""The text of a graph: one operation a line, types always, identical consecutive layers folded.

``parse_graph(print_graph(g))`` equals ``g`` in the sense of ``difference``; docs/graph.md describes the syntax.
Without ``weights`` the text holds parameter names and types only, and parsing binds each to a load of its own name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from compiler.errors import UsageError
from compiler.ir.compare import difference, equal
from compiler.ir.fold import Block, Part, folded, parts_of
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import layer_of, segments, subgraph
from compiler.ir.opdef import Attr
from compiler.ir.parse import implied_scope, parse_graph
from compiler.ir.types import DTYPE_NAMES
from compiler.weights.expr import Expr

__all__ = ["difference", "equal", "parse_graph", "print_graph"]

_BARE_NAME = re.compile(r"[\w.\-]+")


def print_graph(graph: Graph, *, weights: bool = False, layer: int | None = None, fold: bool = True) -> str:
    """The text of ``graph``.

    ``weights`` adds how every parameter is made and stored; ``layer`` shows the layers of that index only (as a
    graph of their own); ``fold=False`` writes every layer out. Raises UsageError when no layer has that index.
    """
    if layer is not None:
        graph = _only_layer(graph, layer)
    return "\n".join(_Printer(graph, weights, fold).lines()) + "\n"


def _only_layer(graph: Graph, index: int) -> Graph:
    parts = segments(graph)
    nodes = [node for found, part in parts if found and found.index == index for node in part]
    if not nodes:
        present = sorted({found.index for found, _ in parts if found})
        remedy = f"it has layers {present[0]} to {present[-1]}" if present else "it has no numbered layers"
        raise UsageError(f"the graph has no layer {index}", remedy=remedy)
    return subgraph(graph, nodes, graph.name)


class _Printer:
    def __init__(self, graph: Graph, weights: bool, fold: bool) -> None:
        self.graph = graph
        self.weights = weights
        self.declared = _declared_in(parts_of(graph)) if weights else {}
        self.blocks = folded(graph, self._description) if fold else [Block([part]) for part in parts_of(graph)]
        self.names: dict[Value, str] = {value: _name(name) for name, value in graph.inputs.items()}
        self.carry_names: dict[int, list[str]] = {}
        self._number()

    def _number(self) -> None:
        """Number what a block carries, then its values; a value of a folded layer has the number of its first."""
        count = 0
        for block in self.blocks:
            self.carry_names[id(block)] = [f"%{count + i}" for i in range(len(block.carries))]
            count += len(block.carries)
            for spot in ((i, j) for i, node in enumerate(block.nodes) for j in range(len(node.outputs))):
                for nodes in (block.nodes, *block.repeats):
                    self.names[nodes[spot[0]].outputs[spot[1]]] = f"%{count}"
                count += 1

    def _description(self, node: Node, base: str) -> object:
        """What must agree between layers that are printed as one, besides where operands come from."""
        layer = layer_of(base)
        params = [value for value in node.inputs if isinstance(value, Param)]
        made = [_weight_lines(p, base, layer.index if layer else None) for p in params if p in self.declared]
        types = [value.type for value in node.outputs]
        names = [_param_text(param, base) for param in params]
        return node.op.name, node.attrs, types, _relative(node.scope, base), names, made

    def lines(self) -> Iterator[str]:
        inputs = ", ".join(f"{_name(name)}: {value.type}" for name, value in self.graph.inputs.items())
        yield f"graph {_name(self.graph.name)}({inputs}) {{"
        for param in self.graph.params.values():
            yield from (f"  {line}" for line in self._top_declaration(param))
        for block in self.blocks:
            yield from (f"  {line}" for line in self._block(block))
        outputs = (f"{_name(name)}={self._operand(value, '')}" for name, value in self.graph.outputs.items())
        yield f"  return {', '.join(outputs)}"
        yield "}"

    def _top_declaration(self, param: Param) -> list[str]:
        if self.weights:
            return [] if param in self.declared else _weight_lines(param, "", None)
        return [] if param.users else [_param_text(param, "")]

    def _block(self, block: Block) -> Iterator[str]:
        alone = len(block.parts) == 1
        names = self._operand_names(block)
        if not alone:
            yield f"{self._repeat(block)} {{"
        for offset, part in enumerate(block.parts):
            head = self._repeat(block) if alone and block.repeats else f"at {_layer_path(part, offset, not alone)}"
            lines = self._part(part, offset, bool(block.repeats), names)
            if part.layer is not None:
                lines = [f"{head} {{", *(f"  {line}" for line in lines), "}"]
            yield from lines if alone else (f"  {line}" for line in lines)
        if not alone:
            yield "}"

    def _repeat(self, block: Block) -> str:
        first, step = block.parts[0], len(block.parts)
        assert first.layer is not None  # only layers repeat
        carried = ", ".join(
            f"{name} = {self._operand(carry.initial, first.base)} then "
            f"{self.names[block.nodes[carry.source[0]].outputs[carry.source[1]]]}"
            for name, carry in zip(self.carry_names[id(block)], block.carries, strict=True)
        )
        start, stop = first.layer.index, first.layer.index + step * (len(block.repeats) + 1)
        head = f"repeat i in {start}..{stop}" + (f" step {step}" if step > 1 else f" at {_layer_path(first, 0, True)}")
        return f"{head} ({carried})" if carried else head

    def _operand_names(self, block: Block) -> dict[Node, list[str | None]]:
        """What each operand of the unit is called where it is carried."""
        carry_names = dict(zip(block.carries, self.carry_names[id(block)], strict=True))
        carried = {spot: carry_names[carry] for spot, carry in block.carried.items()}
        return {
            node: [carried.get((index, position)) for position in range(len(node.inputs))]
            for index, node in enumerate(block.nodes)
        }

    def _part(self, part: Part, offset: int, repeated: bool, names: dict[Node, list[str | None]]) -> list[str]:
        own = [param for param, first in self.declared.items() if first is part.nodes[0]]
        index = part.layer.index if part.layer and repeated else None
        lines = [line for param in own for line in _weight_lines(param, part.base, index, offset)]
        weightless = part.base
        for node in part.nodes:
            operands = [
                name or self._operand(value, part.base) for name, value in zip(names[node], node.inputs, strict=True)
            ]
            implied, weightless = implied_scope(node, weightless)
            scope = "" if node.scope == implied else f" at {_relative(node.scope, part.base)}"
            lines.append(self._node(node, operands) + scope)
        return lines

    def _node(self, node: Node, operands: list[str]) -> str:
        results = ", ".join(self.names[value] for value in node.outputs)
        types = ", ".join(str(value.type) for value in node.outputs)
        attrs = ", ".join(_attr(name, node.op.attrs[name], value) for name, value in node.attrs.items())
        shown = f" {{{attrs}}}" if attrs else ""
        return f"{results} = {node.op.name}({', '.join(operands)}){shown} : {types}"

    def _operand(self, value: Value | None, base: str) -> str:
        if value is None:
            return "none"
        return _param_text(value, base) if isinstance(value, Param) else self.names[value]


def _declared_in(parts: list[Part]) -> dict[Param, Node]:
    """The parameters that are declared within a layer: first used there and named below it; the layer's first node."""
    declared: dict[Param, Node] = {}
    seen: set[Param] = set()
    for part in parts:
        params = {v: None for node in part.nodes for v in node.inputs if isinstance(v, Param) and v not in seen}
        seen.update(params)
        below = [param for param in params if part.layer and param.name.startswith(f"{part.base}.")]
        declared.update(dict.fromkeys(below, part.nodes[0]))
    return declared


def _layer_path(part: Part, offset: int, repeated: bool) -> str:
    if part.layer is None or not repeated:
        return part.base
    stack = f"{part.layer.stack}." if part.layer.stack else ""
    return f"{stack}{_counter(offset)}"


def _counter(offset: int) -> str:
    return f"{{i+{offset}}}" if offset else "{i}"


def _relative(path: str, base: str) -> str:
    """A module path as seen from ``base``: ``.`` for itself, ``/path`` for one outside."""
    if not base:
        return path or "."
    if path == base:
        return "."
    return path.removeprefix(f"{base}.") if path.startswith(f"{base}.") else f"/{path}"


def _param_text(param: Param, base: str) -> str:
    return f"@{_relative(param.name, base)}: {param.type}"


def _name(name: str) -> str:
    return name if _BARE_NAME.fullmatch(name) else json.dumps(name)


def _attr(name: str, spec: Attr, value: Any) -> str:
    if value is True:
        return name
    if spec.kind == "dim":
        return f"{name}={value}"
    if spec.kind == "dims" and value is not None:
        return f"{name}=[{', '.join(map(str, value))}]"
    return f"{name}={_literal(value)}"


def _literal(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, float):
        return repr(value)
    return "none" if value is None else json.dumps(value)


def _weight_lines(param: Param, base: str, index: int | None, offset: int = 0) -> list[str]:
    """How ``param`` is made: a line for every shared sub-expression, then the parameter's own.

    The first part of a key that is ``index``, the number of the layer, is written as the counter of the repetition.
    """

    def counted(key: str) -> str:
        parts = key.split(".")
        if index is not None and str(index) in parts:
            parts[parts.index(str(index))] = _counter(offset)
        return ".".join(parts)

    names: dict[Expr, str] = {}
    lines: list[str] = []
    for shared in _shared(param.expr):
        lines.append(f"${len(names)} = {_expr(shared, names, counted)}")
        names[shared] = f"${len(names)}"
    options: dict[str, Any] = {}
    if param.storage != param.expr.type.dtype:
        options["storage"] = param.storage
    if param.aliases:
        options["aliases"] = tuple(counted(alias) for alias in param.aliases)
    if not param.persistent:
        options["persistent"] = False
    shown = ", ".join(f"{name}={_literal(value)}" for name, value in options.items())
    own = f"{_param_text(param, base)} = {_expr(param.expr, names, counted)}"
    return [*lines, f"{own} {{{shown}}}" if shown else own]


def _shared(root: Expr) -> list[Expr]:
    """The sub-expressions that ``root`` uses more than once, operands first."""
    uses: Counter[Expr] = Counter()
    ordered: list[Expr] = []

    def visit(expr: Expr) -> None:
        uses[expr] += 1
        if uses[expr] == 1:
            for arg in expr.args:
                visit(arg)
            ordered.append(expr)

    visit(root)
    return [expr for expr in ordered if uses[expr] > 1]


def _expr(expr: Expr, names: dict[Expr, str], counted: Callable[[str], str]) -> str:
    if expr in names:
        return names[expr]
    if expr.op == "load":
        source, key = _literal(expr.attr("source")), _literal(counted(expr.attr("key")))
        return f"load({source}, {key}): {expr.type}"
    args = [_expr(arg, names, counted) for arg in expr.args]
    args += [f"{name}={_literal(counted(v) if isinstance(v, str) else v)}" for name, v in expr.attrs]
    return f"{expr.op}({', '.join(args)})"
