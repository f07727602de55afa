"""Raise an imported graph to whole operations."""

from __future__ import annotations

from compiler.frontend.rules import axes, heads, norms, rotary, tidy
from compiler.ir.graph import Graph
from compiler.rewrite.driver import Outcome, rewrite


def lift(graph: Graph) -> Outcome:
    """Rewrite ``graph`` in place. What no rule knows stays as it is; the outcome says which rules nearly applied."""
    return rewrite(graph, tidy.RULES, axes.RULES, norms.RULES, rotary.RULES, heads.RULES)
