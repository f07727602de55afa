"""Raise an imported graph to whole operations: apply the rules until none fires, then merge what is computed twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from compiler.frontend.rules import heads, norms, rotary, tidy
from compiler.frontend.rules.site import Rule, Site
from compiler.ir.graph import Graph, Node


def lift(graph: Graph) -> None:
    """Rewrite ``graph`` in place. What no rule knows stays as it is."""
    rules = _by_operation(tidy.RULES, norms.RULES, rotary.RULES, heads.RULES)
    graph.prune()
    while _sweep(graph, rules):
        _merge_duplicates(graph)
        graph.prune()


def _by_operation(*tables: dict[str, tuple[Rule, ...]]) -> dict[str, list[Rule]]:
    rules: dict[str, list[Rule]] = defaultdict(list)
    for table in tables:
        for op, some in table.items():
            rules[op] += some
    return rules


def _sweep(graph: Graph, rules: dict[str, list[Rule]]) -> bool:
    """Visit every node once. Whether anything changed."""
    changed = False
    for node in graph.nodes:
        if node in graph and any(output.users for output in node.outputs) | _is_output(graph, node):
            changed |= _apply(graph, node, rules.get(node.op.name, ()))
    return changed


def _is_output(graph: Graph, node: Node) -> bool:
    return any(value.node is node for value in graph.outputs.values())


def _apply(graph: Graph, node: Node, rules: Iterable[Rule]) -> bool:
    for rule in rules:
        before = len(graph)
        new = rule(Site(graph, node))
        if new is not None:
            graph.replace(node.output, new)
            return True
        if len(graph) != before:
            return True
    return False


def _merge_duplicates(graph: Graph) -> None:
    """Within one scope, a node equal to an earlier one is that one."""
    seen: dict[object, Node] = {}
    for node in graph.nodes:
        key = (node.op.name, node.scope, tuple(map(id, node.inputs)), repr(sorted(node.attrs.items())))
        first = seen.setdefault(key, node)
        if first is not node:
            for old, new in zip(node.outputs, first.outputs, strict=True):
                graph.replace(old, new)
