"""Tracing one layer of each kind instead of all of them.

Deep models repeat a few kinds of layer. Two layers of each kind are traced, the others are passed through; when the
two traces of a kind are the same but for their parameters and for what the layer before them hands on, the lifted
segment stands for every other layer of that kind. When they are not, the whole model is traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from compiler.frontend.params import base_name
from compiler.frontend.subject import Subject
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.weights.expr import Expr, apply

_SCALARS = (int, float, str, bool, type(None))


class NotFoldableError(Exception):
    """The representatives of a kind of layer differ, or hand on more than one value."""


@dataclass(frozen=True)
class LayerList:
    """A list of layers: the path of its ModuleList, and for every layer the index of the first of its kind."""

    path: str
    kinds: tuple[int, ...]

    @property
    def kept(self) -> list[int]:
        """The layers that are traced: the first two of every kind."""
        return [i for i, kind in enumerate(self.kinds) if self.kinds[:i].count(kind) < 2]

    def scope(self, index: int) -> str:
        return f"{self.path}.{index}"

    def index_of(self, scope: str) -> int:
        """The layer that a scope is in; -1 for none."""
        inside = scope.startswith(f"{self.path}.")
        return int(scope[len(self.path) + 1 :].split(".")[0]) if inside else -1


def layer_lists(module: nn.Module) -> list[LayerList]:
    """The outermost ModuleLists in which some kind of layer occurs more than twice."""
    lists: list[LayerList] = []
    for path, child in module.named_modules():
        inside = any(path.startswith(f"{found.path}.") for found in lists)
        if isinstance(child, nn.ModuleList) and not inside and len(child) > 2:
            per_layer = _per_layer_settings(module, len(child))
            signatures = [(_signature(layer, i), *(s[i] for s in per_layer)) for i, layer in enumerate(child)]
            found = LayerList(path, tuple(signatures.index(signature) for signature in signatures))
            if len(found.kept) < len(child):
                lists.append(found)
    return lists


def _per_layer_settings(module: nn.Module, count: int) -> list[list[Any]]:
    """The config's lists with one entry a layer, such as ``layer_types``."""
    config = getattr(module, "config", None)
    settings: dict[str, Any] = vars(config) if config is not None else {}
    return [value for value in settings.values() if isinstance(value, list) and len(cast("list[Any]", value)) == count]


def _signature(layer: nn.Module, index: int) -> tuple[object, ...]:
    """What must agree for two layers to be of one kind: classes, tensors' shapes, and settings but the index."""
    parts: list[object] = []
    for path, child in layer.named_modules():
        settings = [
            (name, "index" if type(value) is int and value == index and "layer" in name else value)
            for name, value in sorted(vars(child).items())
            if isinstance(value, _SCALARS)
        ]
        parts.append((path, type(child), tuple(settings)))
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return (*parts, *((name, tensor.shape) for name, tensor in tensors))


# --- unfolding -----------------------------------------------------------------------------------------------


@dataclass
class _Unfolding:
    """One list's unfolding: each traced layer's nodes, the one value it hands on, and the one it now reads."""

    graph: Graph
    subject: Subject
    layers: LayerList
    segments: dict[int, list[Node]]
    handed: dict[int, Value] = field(default_factory=dict[int, Value])
    entering: dict[int, Value] = field(default_factory=dict[int, Value])

    def before(self, index: int) -> int:
        """The traced layer before a traced one; -1 for what enters the first."""
        kept = self.layers.kept
        position = kept.index(index)
        return kept[position - 1] if position else -1


def unfold(graph: Graph, subject: Subject, lists: Sequence[LayerList]) -> None:
    """Add the layers that were passed through. Raises NotFoldableError when the traced ones do not stand for them."""
    for layers in lists:
        state = _Unfolding(graph, subject, layers, _segments(graph, layers))
        _find_handed(state)
        _stitch(state)


def _segments(graph: Graph, layers: LayerList) -> dict[int, list[Node]]:
    """The nodes of every traced layer, which must follow one another without a stranger between."""
    segments: dict[int, list[Node]] = {index: [] for index in layers.kept}
    order: list[int] = []
    for node in graph.nodes:
        index = layers.index_of(node.scope)
        if index >= 0:
            segments.setdefault(index, []).append(node)
        if not order or order[-1] != index:
            order.append(index)
    if [index for index in order if index >= 0] != layers.kept or -1 in order[order.index(layers.kept[0]) :][:-1]:
        raise NotFoldableError("layers are not computed one after another")
    return segments


def _find_handed(state: _Unfolding) -> None:
    """Compare the two representatives of every kind, and learn which value each traced layer hands on."""
    pairs = [
        [i for i in state.layers.kept if state.layers.kinds[i] == kind] for kind in dict.fromkeys(state.layers.kinds)
    ]
    matched = [(pair[0], pair[1], _match(state, *pair)) for pair in pairs if len(pair) == 2]
    for first, second, same in matched:
        for one, other in ((first, second), (second, first)):
            twin = {v: k for k, v in same.items()} if one is second else same
            if one in state.handed and other not in state.handed and state.handed[one] in twin:
                state.handed[other] = twin[state.handed[one]]
        if first in state.handed and same.get(state.handed[first]) is not state.handed.get(second):
            raise NotFoldableError("two layers of a kind hand on different values")
    _check_outside_uses(state)


def _match(state: _Unfolding, first: int, second: int) -> dict[Value, Value]:
    """The correspondence of values between two layers. Raises NotFoldableError where they differ."""
    ours, theirs = state.segments[first], state.segments[second]
    same: dict[Value, Value] = {}
    rename = _Renaming(state.subject, state.layers, first, second)
    if len(ours) != len(theirs):
        raise NotFoldableError("two layers of a kind have different lengths")
    for one, other in zip(ours, theirs, strict=True):
        if (one.op, one.attrs, rename.scope(one.scope)) != (other.op, other.attrs, other.scope):
            raise NotFoldableError(f"two layers of a kind differ in {one.op.name}")
        if len(one.inputs) != len(other.inputs):
            raise NotFoldableError(f"two layers of a kind differ in {one.op.name}")
        for mine, its in zip(one.inputs, other.inputs, strict=True):
            _match_input(state, rename, same, mine, its)
        same.update(zip(one.outputs, other.outputs, strict=True))
    return same


def _match_input(
    state: _Unfolding, rename: _Renaming, same: Mapping[Value, Value], mine: Value | None, its: Value | None
) -> None:
    if mine is its or (mine is not None and same.get(mine) is its):
        return
    if mine is None or its is None:
        raise NotFoldableError("two layers of a kind differ in an optional input")
    if isinstance(mine, Param) and isinstance(its, Param):
        if not rename.owns(mine) or rename.name(mine.name) != its.name or rename.expr(mine) != its.expr:
            raise NotFoldableError(f"two layers of a kind read {mine.name} and {its.name} differently")
        return
    for layer, value in ((rename.first, mine), (rename.second, its)):
        if state.handed.setdefault(state.before(layer), value) is not value:
            raise NotFoldableError("a layer hands on more than one value")


def _check_outside_uses(state: _Unfolding) -> None:
    """After the last layer, only what it hands on may be read."""
    inside = {node for nodes in state.segments.values() for node in nodes}
    for index, nodes in state.segments.items():
        if index not in state.handed:
            raise NotFoldableError("what a layer hands on is not known")
        for value in (output for node in nodes for output in node.outputs):
            outside = any(user not in inside for user in value.users) or value in state.graph.outputs.values()
            if outside and (value is not state.handed[index] or index != state.layers.kept[-1]):
                raise NotFoldableError("a value inside a layer is read outside")


def _stitch(state: _Unfolding) -> None:
    """Put copies of the representatives between and after the traced layers, each fed by the one before it."""
    graph, layers = state.graph, state.layers
    following = _following(graph, state.segments)
    inside = {node for nodes in state.segments.values() for node in nodes}
    final = [node for node in state.handed[layers.kept[-1]].users if node not in inside]
    current, anchor = state.handed[0], following[0]
    for index in range(1, len(layers.kinds)):
        if index in state.segments:
            _rewire(graph, state.segments[index], state.handed[state.before(index)], current)
            state.entering[index] = current
            current, anchor = state.handed[index], following[index]
        else:
            current = _copy(state, index, current, anchor)
    _rewire(graph, final, state.handed[layers.kept[-1]], current)
    for name, value in graph.outputs.items():
        if value is state.handed[layers.kept[-1]]:
            graph.outputs[name] = current


def _following(graph: Graph, segments: Mapping[int, list[Node]]) -> dict[int, Node | None]:
    """The node after each traced layer's last one."""
    last = {nodes[-1]: index for index, nodes in segments.items()}
    found: dict[int, Node | None] = dict.fromkeys(segments)
    previous: Node | None = None
    for node in graph.nodes:
        if previous in last:
            found[last[previous]] = node
        previous = node
    return found


def _rewire(graph: Graph, nodes: Sequence[Node], old: Value, new: Value) -> None:
    if old is new:
        return
    for node in nodes:
        for position, value in enumerate(node.inputs):
            if value is old:
                graph.set_input(node, position, new)


def _copy(state: _Unfolding, index: int, current: Value, anchor: Node | None) -> Value:
    """A copy of the second representative of a layer's kind. Returns what the copy hands on."""
    kind = state.layers.kinds[index]
    template = [i for i in state.layers.kept if state.layers.kinds[i] == kind][-1]
    rename = _Renaming(state.subject, state.layers, template, index)
    values: dict[Value, Value] = {state.entering[template]: current}
    for node in state.segments[template]:
        for value in node.inputs:
            if isinstance(value, Param) and rename.owns(value) and value not in values:
                values[value] = rename.param(state.graph, value)
        inputs = [None if value is None else values.get(value, value) for value in node.inputs]
        copied = state.graph.append(node.op.name, inputs, node.attrs, scope=rename.scope(node.scope), before=anchor)
        values.update(zip(node.outputs, copied.outputs, strict=True))
    return values[state.handed[template]]


# --- parameters of other layers ------------------------------------------------------------------------------


class _Renaming:
    """What belongs to one layer, as it is called in another."""

    def __init__(self, subject: Subject, layers: LayerList, first: int, second: int) -> None:
        self.first, self.second = first, second
        self._subject = subject
        self._from, self._to = layers.scope(first), layers.scope(second)

    def owns(self, param: Param) -> bool:
        return param.name.startswith(f"{self._from}.")

    def scope(self, scope: str) -> str:
        return self._to + scope[len(self._from) :]

    def name(self, name: str) -> str:
        return self._to + name[len(self._from) :]

    def expr(self, param: Param) -> Expr:
        """The parameter's expression over the other layer's tensors."""
        base = base_name(self._subject.weights, param.name)
        other = self._subject.weights.get(self.name(base))
        if param.aliases or other is None:
            raise NotFoldableError(f"{param.name} is shared between layers")
        leaves: dict[str, Expr] = {}
        _pair_leaves(self._subject.weights[base], other, leaves)
        return _substitute(param.expr, leaves)

    def param(self, graph: Graph, param: Param) -> Param:
        name = self.name(param.name)
        if name in graph.params:
            return graph.params[name]
        expr = self.expr(param)
        dtype = self._subject.weights[self.name(base_name(self._subject.weights, param.name))].type.dtype
        storage = dtype if param.expr.type.dtype == param.storage else param.storage
        return graph.add_param(name, expr, storage, persistent=param.persistent)


def _pair_leaves(mine: Expr, its: Expr, leaves: dict[str, Expr]) -> None:
    """Pair the stored tensors of two expressions that are made alike."""
    if mine.op == "load" and its.op == "load" and mine.type.shape == its.type.shape:
        leaves[mine.key] = its
        return
    if (mine.op, mine.attrs, len(mine.args)) != (its.op, its.attrs, len(its.args)):
        raise NotFoldableError("two layers of a kind are stored differently")
    for one, other in zip(mine.args, its.args, strict=True):
        _pair_leaves(one, other, leaves)


def _substitute(expr: Expr, leaves: Mapping[str, Expr]) -> Expr:
    if expr.op == "load":
        if expr.key not in leaves:
            raise NotFoldableError("a layer reads a tensor of another one")
        return leaves[expr.key]
    return apply(expr.op, [_substitute(arg, leaves) for arg in expr.args], dict(expr.attrs)) if expr.args else expr
