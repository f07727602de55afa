"""Applying rules until nothing changes, with an account of what was done and what was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from compiler.errors import VerifyError
from compiler.ir.graph import Graph, Node, Value
from compiler.rewrite.pattern import Match, Mismatch, Op, match


@dataclass(frozen=True)
class Rule:
    """Where ``pattern`` fits and ``check`` finds no reason against it, ``rewrite`` makes the replacement.

    ``check`` returns None, or why the match must be left alone. ``rewrite`` inserts new nodes before ``match.root``
    and returns what replaces the root's outputs: values of the same types, in order.
    """

    name: str
    pattern: Op
    rewrite: Callable[[Graph, Match], Value | Sequence[Value]]
    check: Callable[[Match], str | None] = lambda found: None


@dataclass(frozen=True)
class Refusal:
    """A place where a rule nearly applied: the rule, the scope and operation, and the reason."""

    rule: str
    scope: str
    op: str
    reason: str


@dataclass
class Outcome:
    """How often each rule was applied, and where one was not although at least half of its pattern was there."""

    applied: Counter[str] = field(default_factory=Counter[str])
    refused: list[Refusal] = field(default_factory=list[Refusal])


def rewrite(graph: Graph, rules: Iterable[Rule]) -> Outcome:
    """Apply ``rules`` everywhere until none applies; earlier rules go first at each node.

    Matched nodes that nobody uses afterwards are erased. Raises VerifyError when a replacement has other types.
    """
    by_op: dict[str, list[Rule]] = {}
    for rule in rules:
        for name in rule.pattern.names:
            by_op.setdefault(name, []).append(rule)
    outcome = Outcome()
    refused: dict[tuple[str, Node], Refusal] = {}
    pending = dict.fromkeys(graph.nodes)
    while pending:
        node = next(iter(pending))
        del pending[node]
        if node in graph:
            changed = _apply_first(graph, node, by_op.get(node.op.name, []), outcome, refused)
            pending.update(dict.fromkeys(changed))
    outcome.refused = [refusal for (_, node), refusal in refused.items() if node in graph]
    return outcome


def _apply_first(
    graph: Graph, node: Node, rules: Sequence[Rule], outcome: Outcome, refused: dict[tuple[str, Node], Refusal]
) -> list[Node]:
    """Apply the first rule that fits at ``node``; the nodes that should be looked at again."""
    for rule in rules:
        found = match(rule.pattern, node)
        reason = found.reason if isinstance(found, Mismatch) else rule.check(found)
        where = found.where if isinstance(found, Mismatch) else node
        if isinstance(found, Match) and reason is None:
            outcome.applied[rule.name] += 1
            return _replace(graph, rule, found)
        if isinstance(found, Match) or 2 * found.fitted >= rule.pattern.size:
            refused[rule.name, node] = Refusal(rule.name, where.scope, where.op.name, reason or "")
    return []


def _replace(graph: Graph, rule: Rule, found: Match) -> list[Node]:
    made = rule.rewrite(graph, found)
    values = [made] if isinstance(made, Value) else list(made)
    old = [output.type for output in found.root.outputs]
    new = [value.type for value in values]
    if old != new:
        shown = [", ".join(map(str, types)) for types in (old, new)]
        raise VerifyError(f"rule `{rule.name}` replaces {shown[0]} by {shown[1]}", where=found.root.scope)
    for output, value in zip(found.root.outputs, values, strict=True):
        graph.replace(output, value)
    _erase_unused(graph, found)
    makers = [value.node for value in values if value.node is not None]
    return makers + [user for value in values for user in value.users]


def _erase_unused(graph: Graph, found: Match) -> None:
    """Erase the matched nodes that nobody uses any more."""
    outputs = set(graph.outputs.values())
    remaining = list(found.nodes)
    for _ in found.nodes:
        unused = [node for node in remaining if not any(v.users or v in outputs for v in node.outputs)]
        remaining = [node for node in remaining if node not in unused]
        for node in unused:
            graph.erase(node)
