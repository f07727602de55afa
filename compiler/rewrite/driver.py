"""Applying rules until nothing changes, with an account of what was done and what was not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compiler.errors import VerifyError
from compiler.ir.graph import Graph, Node
from compiler.rewrite.site import Refused, Rule, Site

Rules = Mapping[str, Sequence[Rule]]
"""Rules by the operation of the node they replace; earlier ones go first."""


@dataclass(frozen=True)
class Refusal:
    """A place where a rule was not applied although it nearly fits, and the reason."""

    rule: str
    scope: str
    op: str
    reason: str


@dataclass
class Outcome:
    """How often each rule was applied, and where one was refused."""

    applied: Counter[str] = field(default_factory=Counter[str])
    refused: list[Refusal] = field(default_factory=list[Refusal])


def rewrite(graph: Graph, *tables: Rules) -> Outcome:
    """Apply the rules everywhere until none applies; after each sweep, merge what is computed twice and prune.

    Raises VerifyError when a rule replaces a value by one of another type.
    """
    rules: dict[str, list[Rule]] = defaultdict(list)
    for table in tables:
        for op, some in table.items():
            rules[op] += some
    graph.prune()
    outcome, refused = Outcome(), dict[tuple[Node, str], Refused]()
    while _sweep(graph, rules, outcome, refused):
        _merge_duplicates(graph)
        graph.prune()
    outcome.refused = [_refusal(node, rule, reason) for (node, rule), reason in refused.items() if node in graph]
    return outcome


def _refusal(node: Node, rule: str, refused: Refused) -> Refusal:
    where = refused.where or node
    return Refusal(rule, where.scope, where.op.name, refused.reason)


def _sweep(
    graph: Graph, rules: Mapping[str, list[Rule]], outcome: Outcome, refused: dict[tuple[Node, str], Refused]
) -> bool:
    """Visit every node once. Whether anything changed."""
    changed = False
    for node in graph.nodes:
        if node in graph and _is_used(graph, node):
            changed |= any(_apply(graph, node, rule, outcome, refused) for rule in rules.get(node.op.name, ()))
    return changed


def _is_used(graph: Graph, node: Node) -> bool:
    return any(output.users for output in node.outputs) or any(v.node is node for v in graph.outputs.values())


def _apply(graph: Graph, node: Node, rule: Rule, outcome: Outcome, refused: dict[tuple[Node, str], Refused]) -> bool:
    """Whether ``rule`` changed the graph: by what it returned, or by edits of its own."""
    before, name = len(graph), rule.__name__
    new = rule(Site(graph, node))
    if isinstance(new, Refused):
        refused[node, name] = new
    elif new is not None:
        if new.type != node.output.type:
            raise VerifyError(f"rule `{name}` replaces {node.output.type} by {new.type}", where=node.scope)
        graph.replace(node.output, new)
    changed = len(graph) != before or not (new is None or isinstance(new, Refused))
    outcome.applied[name] += changed
    return changed


def _merge_duplicates(graph: Graph) -> None:
    """Within one scope, a node equal to an earlier one is that one."""
    seen: dict[object, Node] = {}
    for node in graph.nodes:
        key = (node.op.name, node.scope, tuple(map(id, node.inputs)), repr(sorted(node.attrs.items())))
        first = seen.setdefault(key, node)
        if first is not node:
            for old, new in zip(node.outputs, first.outputs, strict=True):
                graph.replace(old, new)
