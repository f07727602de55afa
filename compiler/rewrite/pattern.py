"""Patterns written as calls, and matching them against a graph from a node backwards.

    x, weight = var("x"), param("weight")
    mean = op("mean", op("pow", x, scalar=2.0), axes=(-1,), keep=True)
    rms_norm = op("mul", op("mul", x, op("rsqrt", op("add", mean, scalar=attr("eps")))), weight)

A name that stands twice must be the same value both times. The operands of add, mul, minimum, maximum and the logical
operations match in either order. A match that fails says what was expected, what was found, and where. ``rule`` makes
a rewrite rule of a pattern and a function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from compiler.ir.graph import Node, Param, Value
from compiler.rewrite.site import Refused, Rule, Site

_COMMUTATIVE = frozenset({"add", "mul", "minimum", "maximum", "logical_and", "logical_or"})


@dataclass(frozen=True)
class Var:
    """Any value (with ``weight``, only a parameter), bound to ``name``."""

    name: str
    weight: bool = False


@dataclass(frozen=True)
class AttrVar:
    """Any value of an attribute, bound to ``name``; the same name must have the same value everywhere."""

    name: str


@dataclass(frozen=True)
class Op:
    """An operation. The result of a ``private`` one is used nowhere else; ``name`` binds the node's result."""

    names: tuple[str, ...]
    operands: tuple[Pattern | None, ...]
    attrs: tuple[tuple[str, Any], ...]
    output: int = 0
    name: str = ""
    private: bool = False

    @property
    def size(self) -> int:
        """How many operations the pattern has."""
        return 1 + sum(_size(operand) for operand in self.operands)


@dataclass(frozen=True)
class Either:
    """The first of ``options`` that matches."""

    options: tuple[Pattern, ...]


Pattern = Var | Op | Either


def var(name: str) -> Var:
    """Any value."""
    return Var(name)


def param(name: str) -> Var:
    """Any parameter."""
    return Var(name, weight=True)


def attr(name: str) -> AttrVar:
    """Any value of an attribute."""
    return AttrVar(name)


def op(
    names: str, *operands: Pattern | None, output: int = 0, name: str = "", private: bool = False, **attrs: Any
) -> Op:
    """An operation (``"silu|gelu"``: one of several) on ``operands``; attributes not given have their default."""
    return Op(tuple(names.split("|")), operands, tuple(attrs.items()), output, name, private)


def either(*options: Pattern) -> Either:
    """Alternatives, tried in order."""
    return Either(options)


def _size(pattern: Pattern | None) -> int:
    match pattern:
        case Op():
            return pattern.size
        case Either(options=options):
            return min(_size(option) for option in options)
        case _:
            return 0


@dataclass(frozen=True)
class Match:
    """Where a pattern fits: ``match["x"]`` is what its names are bound to."""

    root: Node
    nodes: tuple[Node, ...]
    bound: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def value(self, name: str) -> Value:
        """A bound value."""
        found: Value = self.bound[name]
        return found

    def weight(self, name: str) -> Param:
        """A bound parameter."""
        found: Param = self.bound[name]
        return found


@dataclass(frozen=True)
class Mismatch:
    """Why a pattern does not fit: the reason, the node where it fails, and how many operations fitted until there."""

    reason: str
    where: Node
    fitted: int


def rule(pattern: Op) -> Callable[[Callable[[Site, Match], Value | Refused | None]], Rule]:
    """Make a rule of a function that says what replaces a match of ``pattern``, or why it must be left alone.

    Where at least half of the pattern fits, the rule says why the rest does not.
    """

    def decorate(replace: Callable[[Site, Match], Value | Refused | None]) -> Rule:
        @functools.wraps(replace)
        def apply(site: Site) -> Value | Refused | None:
            found = match(pattern, site.node)
            if isinstance(found, Match):
                return replace(site, found)
            return Refused(found.reason, found.where) if 2 * found.fitted >= pattern.size else None

        return apply

    return decorate


def match(pattern: Op, root: Node) -> Match | Mismatch:
    """Fit ``pattern`` with its outermost operation at ``root``."""
    search = _Search(Mismatch("", root, -1))
    if pattern.output >= len(root.outputs):
        return Mismatch(f"`{root.op.name}` has no output {pattern.output}", root, 0)
    for state in search.fit(pattern, root.outputs[pattern.output], _State(), root):
        escaped = _escape(state, root)
        if escaped is None:
            return Match(root, tuple(state.nodes), state.bound)
        search.failed(state, escaped, f"the result of `{escaped.op.name}` is used elsewhere too")
    return search.best


def _escape(state: _State, root: Node) -> Node | None:
    """A private node of the match, other than the root, whose result is used outside the match."""
    inside = set(state.nodes)
    for node in state.private:
        if node is not root and any(not output.users.keys() <= inside for output in node.outputs):
            return node
    return None


@dataclass(frozen=True)
class _State:
    """What is bound so far. States are never changed, so that alternatives can be tried from one."""

    bound: Mapping[str, Any] = field(default_factory=dict[str, Any])
    nodes: tuple[Node, ...] = ()
    private: frozenset[Node] = frozenset()

    def binding(self, name: str, value: Any) -> _State | None:
        if name in self.bound:
            known = self.bound[name]
            return self if known is value or (not isinstance(value, Value) and known == value) else None
        return _State({**self.bound, name: value}, self.nodes, self.private)

    def visiting(self, node: Node, private: bool) -> _State:
        nodes = self.nodes if node in self.nodes else (*self.nodes, node)
        return _State(self.bound, nodes, self.private | {node} if private else self.private)


@dataclass
class _Search:
    best: Mismatch

    def failed(self, state: _State, where: Node, reason: str) -> Mismatch:
        if len(state.nodes) > self.best.fitted:
            self.best = Mismatch(reason, where, len(state.nodes))
        return self.best

    def fit(self, pattern: Pattern | None, value: Value | None, state: _State, reader: Node) -> Iterator[_State]:
        """Every way in which ``value``, an operand of ``reader``, fits ``pattern``."""
        match pattern:
            case None:
                if value is None:
                    yield state
                else:
                    self.failed(state, reader, f"`{reader.op.name}` has an operand that should be absent")
            case Var():
                yield from self._fit_var(pattern, value, state, reader)
            case Either(options=options):
                for option in options:
                    yield from self.fit(option, value, state, reader)
            case Op():
                yield from self._fit_op(pattern, value, state, reader)

    def _fit_var(self, pattern: Var, value: Value | None, state: _State, reader: Node) -> Iterator[_State]:
        if value is None or (pattern.weight and not isinstance(value, Param)):
            expected = "a weight" if pattern.weight else "a value"
            self.failed(state, reader, f"an operand of `{reader.op.name}` should be {expected} ({pattern.name})")
            return
        bound = state.binding(pattern.name, value)
        if bound is None:
            self.failed(state, reader, f"an operand of `{reader.op.name}` is not the same value as {pattern.name}")
        else:
            yield bound

    def _fit_op(self, pattern: Op, value: Value | None, state: _State, reader: Node) -> Iterator[_State]:
        node = value.node if value is not None else None
        expected = " or ".join(f"`{name}`" for name in pattern.names)
        if node is None or node.op.name not in pattern.names or node.outputs[pattern.output] is not value:
            found = f"`{node.op.name}`" if node else "no operation"
            self.failed(state, node or reader, f"expected {expected}, found {found}")
            return
        begun = self._fit_attrs(pattern, node, state)
        if begun is not None and pattern.name:
            begun = begun.binding(pattern.name, value)
        if begun is not None:
            for operands in _orders(node):
                yield from self._fit_operands(pattern, operands, begun.visiting(node, pattern.private), node)

    def _fit_attrs(self, pattern: Op, node: Node, state: _State) -> _State | None:
        expected = dict(pattern.attrs)
        for name, spec in node.op.attrs.items():
            wanted, found = expected.pop(name, spec.default), node.attr(name)
            following = state.binding(wanted.name, found) if isinstance(wanted, AttrVar) else state
            if following is None or (not isinstance(wanted, AttrVar) and wanted != found):
                self.failed(state, node, f"`{node.op.name}` has {name}={found!r}, not {wanted!r}")
                return None
            state = following
        if expected:
            raise ValueError(f"`{node.op.name}` has no attribute {', '.join(expected)}")
        return state

    def _fit_operands(self, pattern: Op, operands: list[Value | None], state: _State, node: Node) -> Iterator[_State]:
        if len(operands) != len(pattern.operands):
            self.failed(state, node, f"`{node.op.name}` has {len(operands)} operands, not {len(pattern.operands)}")
            return
        states: Iterator[_State] = iter([state])
        for wanted, value in zip(pattern.operands, operands, strict=True):
            states = self._fit_each(states, wanted, value, node)
        yield from states

    def _fit_each(
        self, states: Iterator[_State], wanted: Pattern | None, value: Value | None, node: Node
    ) -> Iterator[_State]:
        for state in states:
            yield from self.fit(wanted, value, state, node)


def _orders(node: Node) -> list[list[Value | None]]:
    operands = list(node.inputs)
    swap = node.op.name in _COMMUTATIVE and len(operands) == 2
    return [operands, operands[::-1]] if swap else [operands]
