"""How a change of scale passes through a graph: what must change with a value for the model to compute the same.

``region(graph, value)`` asks that ``value`` be divided, channel by channel, by positive numbers s, and follows that to
all that it touches: an operation that is linear or homogeneous passes it on, a product takes it into its weight, a
norm's scale and shift absorb it. Every element of a touched value is multiplied by s[label]^exponent; which elements
share a label follows from the operations themselves, so heads that share a value, halves of a fused product and what
lies behind reshapes need no cases of their own. Where the change cannot pass, ``Blocked`` says what is in the way.

With ``rotations`` only operations are passed along which vectors of labels may be mixed: sums and moves, no products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.rewrite.labels import FREE, Labels


class Blocked(Exception):
    """A change of scale cannot pass; ``cause`` says what is in the way."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass(frozen=True)
class Factor:
    """A weight is multiplied by s[label]^exponent; ``labels`` broadcast to it, and where they are free by 1."""

    labels: Tensor
    exponent: float

    def equals(self, other: Factor) -> bool:
        return self.exponent == other.exponent and torch.equal(self.labels, other.labels)


@dataclass(frozen=True)
class Use:
    """A weight in ``node``, and the axis along which its product reads (``reads``) or writes."""

    node: Node
    param: Param
    axis: int
    reads: bool


@dataclass(frozen=True)
class Region:
    """What changes together, by ``size`` numbers.

    ``factors`` of every weight, ``readers`` among its uses, ``values`` that are scaled on the way, and ``heads``:
    labels [heads, width] that attention keeps apart, one row of all where it does not.
    """

    size: int
    factors: Mapping[Param, tuple[Factor, ...]]
    readers: tuple[Use, ...]
    values: frozenset[Value]
    heads: Tensor


Ask = tuple[Tensor, float]
"""Labels and exponent that are asked of a value."""


@dataclass
class Walk:
    """A state of the search: what is asked of values and of weights in products, and what is left to look at."""

    graph: Graph
    labels: Labels
    rotations: bool = False
    asked: dict[Value, Ask] = field(default_factory=dict[Value, Ask])
    products: dict[Use, Ask] = field(default_factory=dict[Use, Ask])
    heads: Tensor | None = None
    pending: list[Value] = field(default_factory=list[Value])

    def copy(self) -> Walk:
        state = dict(self.asked), dict(self.products), self.heads, list(self.pending)
        return Walk(self.graph, self.labels.copy(), self.rotations, *state)

    def of(self, value: Value | None) -> Ask | None:
        """What is asked of ``value``, if anything."""
        if value is None or value not in self.asked:
            return None
        labels, exponent = self.asked[value]
        return self.labels.resolved(labels), exponent

    def ask(self, value: Value | None, labels: Tensor, exponent: float) -> None:
        """Ask that ``value`` be scaled. Raises Blocked when something else was asked of it."""
        if value is None or not bool((labels != FREE).any()) or exponent == 0:
            return
        known = self.of(value)
        if known is not None and known[1] != exponent:
            maker = f"what `{value.node.op.name}` makes in `{value.node.scope}`" if value.node else value.name
            raise Blocked(f"{maker} would have to be scaled in two ways")
        labels = self.labels.shrunk(labels if known is None else self.labels.joined(labels, known[0]))
        if known is None or not torch.equal(labels, self.labels.shrunk(known[0])):
            self.asked[value] = labels, exponent
            self.pending.append(value)

    def take(self, node: Node, index: int, axis: int, labels: Tensor, exponent: float, *, reads: bool) -> None:
        """Let operand ``index`` of a product take a scale along ``axis``: ``labels`` broadcast to it."""
        weight = node.input(index)
        if not isinstance(weight, Param):
            raise Blocked(f"the weight of `{node.op.name}` in `{node.scope}` is computed")
        use = Use(node, weight, axis, reads)
        known = self.products.get(use)
        if known is not None and known[1] != exponent:
            raise Blocked(f"{weight.name} would have to be scaled in two ways")
        self.products[use] = (labels if known is None else self.labels.joined(labels, known[0])), exponent


Rule = Callable[[Walk, Node], None]


def region(graph: Graph, value: Value, axis: int = -1, *, rotations: bool = False) -> Region:
    """What must change for ``value`` to be divided by a positive number for each index along ``axis``.

    Raises Blocked when that cannot be.
    """
    size = value.shape[axis]
    if not isinstance(size, int):
        raise Blocked("its width is known to the inputs only")
    shape = [1] * value.type.rank
    shape[axis] = size
    walk = Walk(graph, Labels(size), rotations)
    walk.ask(value, torch.arange(size).reshape(shape), -1.0)
    return _finished(_searched(walk))


def _searched(walk: Walk) -> Walk:
    """The walk at its end. Raises Blocked when there is no way."""
    from compiler.rewrite.scale_rules import choices, passed

    results = set(walk.graph.outputs.values())
    while walk.pending:
        value = walk.pending.pop()
        if value in results:
            raise Blocked("it is an output of the model")
        if value.node is None and not isinstance(value, Param):
            raise Blocked("it is an input of the model")
        around: list[Node] = [*([value.node] if value.node else []), *value.users]
        for node in around:
            options = choices(walk, node)
            if options:
                walk.pending.append(value)
                return _tried(walk, node, options)
            passed(walk, node)
    return walk


def _tried(walk: Walk, node: Node, options: Sequence[Value]) -> Walk:
    """Let the first of ``options`` that leads somewhere carry what is asked of ``node``, their product."""
    reasons: list[str] = []
    for option in options:
        trial = walk.copy()
        labels, exponent = _known(trial.of(node.output))
        try:
            trial.ask(option, trial.labels.fitted(labels, sizes_of(option)), exponent)
            return _searched(trial)
        except Blocked as blocked:
            reasons.append(blocked.cause)
    raise Blocked("; ".join(dict.fromkeys(reasons)))


def _known(ask: Ask | None) -> Ask:
    if ask is None:
        raise ValueError("nothing is asked of this value")
    return ask


def sizes_of(value: Value) -> list[int]:
    """The sizes of a value's axes, 1 for symbolic ones."""
    return [dim if isinstance(dim, int) else 1 for dim in value.shape]


def _finished(walk: Walk) -> Region:
    uses = {use: Factor(walk.labels.resolved(labels), exponent) for use, (labels, exponent) in walk.products.items()}
    factors: dict[Param, list[Factor]] = {}
    for value in walk.asked:
        if isinstance(value, Param):
            factors[value] = [Factor(*_known(walk.of(value)))]
    for use, factor in uses.items():
        own = factors.setdefault(use.param, [])
        if not any(factor.equals(other) for other in own):
            own.append(factor)
    for param in factors:
        _check_shared(walk, param, uses)
    return _numbered(walk, factors, uses)


def _check_shared(walk: Walk, param: Param, uses: Mapping[Use, Factor]) -> None:
    """Every product with a weight must ask the same of it, and nothing else may read it."""
    own = [use for use in uses if use.param is param]
    if not own:
        return
    wanted = [_of_node(own, uses, node) for node in param.users]
    if param in walk.asked or any(each is None or not _same(each, wanted[0]) for each in wanted):
        others = sorted({node.op.name for node in param.users if node not in {use.node for use in own}})
        raise Blocked(
            f"{param.name} is shared" + (f" with {', '.join(f'`{name}`' for name in others)}" if others else "")
        )


def _of_node(own: Sequence[Use], uses: Mapping[Use, Factor], node: Node) -> dict[int, Factor] | None:
    return {use.axis: uses[use] for use in own if use.node is node} or None


def _same(left: dict[int, Factor], right: dict[int, Factor] | None) -> bool:
    return right is not None and left.keys() == right.keys() and all(left[axis].equals(right[axis]) for axis in left)


def _numbered(walk: Walk, factors: Mapping[Param, Sequence[Factor]], uses: Mapping[Use, Factor]) -> Region:
    """The region with its labels numbered from 0 on, without gaps."""
    distinct = walk.labels.distinct
    number = torch.full((int(distinct.max()) + 1,), FREE)
    number[distinct] = torch.arange(len(distinct))

    def renamed(labels: Tensor) -> Tensor:
        return torch.where(labels == FREE, FREE, number[walk.labels.resolved(labels).clamp_min(0)])

    found = {
        param: tuple(Factor(renamed(factor.labels), factor.exponent) for factor in own)
        for param, own in factors.items()
    }
    heads = torch.arange(len(distinct))[None] if walk.heads is None else renamed(walk.heads)
    readers = tuple(use for use in uses if use.reads)
    values = frozenset(value for value in walk.asked if not isinstance(value, Param))
    return Region(len(distinct), found, readers, values, heads)


def inner_region(node: Node) -> Region:
    """What must change for what the second matrices of experts read to be divided: rows of the first ones' upper half.

    Raises Blocked where the gate is no product of that half.
    """
    if node.op.name != "experts" or node.attr("activation") == "clamped_swish":
        raise Blocked(f"`{node.op.name}` clamps what it reads")
    wide, down, bias = (node.optional_input(index) for index in (3, 4, 5))
    if not isinstance(wide, Param) or not isinstance(down, Param):
        raise Blocked("the weights of the experts are computed")
    params = [wide, down, *([bias] if isinstance(bias, Param) else [])]
    if any(len(param.users) > 1 for param in params):
        raise Blocked("the weights of the experts are shared")
    experts, width = down.expr.shape[0], down.expr.shape[2]
    labels = torch.arange(experts * width).reshape(experts, width)
    rows = torch.cat((torch.full_like(labels, FREE), labels), 1)
    factors = {wide: (Factor(rows[..., None], -1.0),), down: (Factor(labels[:, None], 1.0),)}
    if isinstance(bias, Param):
        factors[bias] = (Factor(rows, -1.0),)
    return Region(math.prod(labels.shape), factors, (Use(node, down, 2, True),), frozenset(), labels)
