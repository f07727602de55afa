"""The tokens of a model: tables that are looked up by their numbers, and what makes a logit for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from compiler.errors import PassError
from compiler.ir.coupling import CouplingGroup, coupling_groups
from compiler.ir.graph import Graph, Param, Value
from compiler.rewrite.removal import remove

ELEMENTWISE = frozenset(("linear", "add", "sub", "mul", "div", "tanh", "cast"))
"""What may happen to a logit by itself."""


@dataclass(frozen=True)
class Vocabulary:
    """``groups`` of ``size`` indices each, which are numbers of tokens; ``tables`` are what tokens are looked up in."""

    size: int
    tables: tuple[Param, ...]
    groups: tuple[CouplingGroup, ...]

    @property
    def params(self) -> list[Param]:
        """Every weight that has a row for each token, once."""
        return list(dict.fromkeys(member.param for group in self.groups for member in group.members))


def vocabulary_of(graph: Graph) -> Vocabulary:
    """The tokens of ``graph``. Raises PassError when it takes anything else, or does anything else with them."""
    tables = _tables(graph)
    size = tables[0].type.static_shape[0]
    groups = [group for group in coupling_groups(graph) if group.size == size and _of_tokens(graph, group, tables)]
    for group in groups:
        makers = {value.node.op.name for value, _, _ in group.values if value.node is not None}
        if odd := sorted(makers - ELEMENTWISE):
            raise PassError(
                f"`{odd[0]}` computes with numbers of tokens",
                option="what",
                remedy="prune something else than the vocabulary",
            )
    return Vocabulary(size, tuple(tables), tuple(groups))


def keep_tokens(graph: Graph, found: Vocabulary, kept: Sequence[int]) -> None:
    """Leave of the tokens of ``graph`` those ``kept``, numbered in this order: their logits are what they were."""
    remove(graph, {replace(group, frozen="", chosen=""): kept for group in found.groups})
    before = graph.tokens or range(found.size)
    graph.tokens = tuple(before[token] for token in kept)


def _tables(graph: Graph) -> list[Param]:
    if len(graph.inputs) != 1:
        raise PassError(
            f"the model takes {', '.join(graph.inputs)}, and not tokens alone",
            option="what",
            remedy="prune something else than the vocabulary",
        )
    (ids,) = graph.inputs.values()
    tables = [node.input(0) for node in ids.users if node.op.name == "embedding" and node.input(1) is ids]
    other = next((node for node in ids.users if node.op.name != "embedding"), None)
    if other is not None or not tables:
        reason = f"`{other.op.name}` in `{other.scope}` reads them" if other else "it takes none"
        raise PassError(
            f"tokens cannot get other numbers: {reason}",
            option="what",
            remedy="prune something else than the vocabulary",
        )
    params = [table for table in tables if isinstance(table, Param)]
    if len(params) < len(tables) or len({param.type.shape[0] for param in params}) > 1:
        raise PassError(
            "tokens are looked up in tables that are computed, or of several lengths",
            option="what",
            remedy="prune something else than the vocabulary",
        )
    return params


def _of_tokens(graph: Graph, group: CouplingGroup, tables: Iterable[Value]) -> bool:
    """Whether an index of ``group`` is a token's number: rows of a table, or places of the logits."""
    if any(member.stride != 1 or member.axis != 0 for member in group.members):
        return False
    made = {value for value, _, _ in group.values}
    logits = graph.outputs.get("logits")
    return any(member.param in set(tables) for member in group.members) or logits in made
