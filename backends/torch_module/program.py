"""A graph as nested programs: for each module the operations and calls of its forward, in order.

What a module reads from outside are its arguments. Operations that attend also read a mask and the cache, which the
graph does not have: they are values of their own here, made by the model and handed down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch

from backends.torch_module.layout import Layout, below, join, values_of
from compiler.errors import TargetError
from compiler.ir.graph import Graph, Node, Value
from compiler.ir.types import TensorType

ATTENTION = ("attention", "latent_attention")
NOTHING = TensorType(torch.bool, ())


@dataclass
class Extras:
    """Values that only the generated module has: the cache, and a mask for each window (0: none).

    ``named`` are further values that modules hand down under names of their own, ``crossing`` the attention to another
    sequence, whose keys and values do not change from token to token, ``choosing`` what chooses tokens of prompts.
    """

    cache: Value = field(default_factory=lambda: Value("past_key_values", NOTHING))
    masks: dict[int, Value] = field(default_factory=dict[int, Value])
    of_node: dict[Node, list[Value]] = field(default_factory=dict[Node, list[Value]])
    named: dict[Value, str] = field(default_factory=dict[Value, str])
    crossing: set[Node] = field(default_factory=set[Node])
    choosing: set[Node] = field(default_factory=set[Node])

    def read_by(self, node: Node) -> list[Value]:
        """Everything that ``node`` reads besides parameters."""
        return [*values_of(node), *self.of_node.get(node, ())]


@dataclass
class Call:
    """A submodule applied: ``name`` is its attribute."""

    name: str
    body: Body


@dataclass
class Loop:
    """Layers of a stack, one after another, from the layer ``first`` on: all of them, unless there are layers that hand
    on more than one value and are called by themselves."""

    name: str
    layers: list[Body]
    entering: Value
    leaving: Value
    first: int = 0


Item = Node | Call | Loop


@dataclass
class Body:
    """The program of one module. ``inputs`` come in the order of first use; ``outputs`` are read outside."""

    path: str
    items: list[Item]
    inputs: list[Value]
    outputs: list[Value]

    def loops(self) -> list[Loop]:
        """The stacks that this body runs itself."""
        return [item for item in self.items if isinstance(item, Loop)]

    def walk(self) -> Iterator[Body]:
        """This body and all within it."""
        yield self
        for item in self.items:
            inner = [item.body] if isinstance(item, Call) else item.layers if isinstance(item, Loop) else []
            for body in inner:
                yield from body.walk()


def inputs_of(item: Item, extras: Extras) -> list[Value]:
    """What an item reads."""
    if isinstance(item, Node):
        return extras.read_by(item)
    if isinstance(item, Call):
        return item.body.inputs
    shared = {value: None for layer in item.layers for value in layer.inputs}
    carried = {layer.outputs[0] for layer in item.layers}
    return [value for value in shared if value not in carried]


def outputs_of(item: Item) -> list[Value]:
    if isinstance(item, Node):
        return item.outputs
    return item.body.outputs if isinstance(item, Call) else [item.leaving]


def program_of(graph: Graph, nodes: Sequence[Node], layout: Layout, extras: Extras) -> Body:
    """The program of the whole model. Raises TargetError when modules are not run one after another."""
    return _Builder(graph, nodes, layout, extras).body("", list(nodes))


class _Builder:
    def __init__(self, graph: Graph, nodes: Sequence[Node], layout: Layout, extras: Extras) -> None:
        self.layout = layout
        self.extras = extras
        self.results = set(graph.outputs.values())
        self.readers: dict[Value, set[Node]] = {}
        for node in nodes:
            for value in extras.read_by(node):
                self.readers.setdefault(value, set()).add(node)

    def body(self, path: str, nodes: list[Node]) -> Body:
        groups: dict[object, list[Node]] = {}
        for node in nodes:
            child = _child(self.layout.container[node], path)
            groups.setdefault(child or node, []).append(node)
        items = [item for key, members in groups.items() for item in self._items(path, key, members)]
        ordered = _in_order(items, self.extras, path)
        inside = set(nodes)
        made = {value for node in nodes for value in node.outputs}
        read = {value: None for item in ordered for value in inputs_of(item, self.extras) if value not in made}
        outputs = [
            value
            for item in ordered
            for value in outputs_of(item)
            if value in self.results or not self.readers.get(value, set()) <= inside
        ]
        return Body(path, ordered, list(read), outputs)

    def _items(self, path: str, key: object, nodes: list[Node]) -> list[Item]:
        if isinstance(key, Node):
            return [key]
        name = str(key)
        inner = join(path, name)
        numbered = [_child(self.layout.container[node], inner) or "" for node in nodes]
        if all(number.isdigit() for number in numbered):
            return self._stack(name, inner, nodes)
        return [Call(name, self.body(inner, nodes))]

    def _stack(self, name: str, path: str, nodes: list[Node]) -> list[Item]:
        """Loops over layers that hand on one value, and calls of those that hand on more."""
        members: dict[int, list[Node]] = {}
        for node in nodes:
            members.setdefault(int(_child(self.layout.container[node], path) or 0), []).append(node)
        layers = [self.body(join(path, str(index)), members[index]) for index in sorted(members)]
        if sorted(members) != list(range(len(members))):
            raise TargetError(f"the layers of {path} are not numbered from 0 on")
        for before, layer in pairwise(layers):
            if not set(before.outputs) & set(layer.inputs):
                raise TargetError(f"{layer.path} does not read what {before.path} makes")
        items: list[Item] = []
        for several, run in groupby(enumerate(layers), lambda pair: len(pair[1].outputs) > 1):
            part = list(run)
            if several:
                items += [Call(f"{name}[{index}]", layer) for index, layer in part]
            else:
                items.append(self._loop(name, path, [layer for _, layer in part], part[0][0]))
        return items

    def _loop(self, name: str, path: str, layers: list[Body], first: int) -> Loop:
        made = [layer.outputs[0] for layer in layers]
        entering = [value for value in layers[0].inputs if _alike(value, made[0]) and value.node is not None]
        if len(entering) != 1:
            raise TargetError(f"{layers[0].path} reads {len(entering)} values like the one it makes, not one")
        _check_chain(layers, path)
        return Loop(name, layers, entering[0], made[-1], first)


def stacks_of(program: Body) -> dict[str, Loop]:
    """By path, all layers of each stack, be they run in a loop or called by themselves."""
    found: dict[str, Loop] = {}
    for body in program.walk():
        for item in body.items:
            if not isinstance(item, Loop) and not (isinstance(item, Call) and "[" in item.name):
                continue
            layers = item.layers if isinstance(item, Loop) else [item.body]
            name = item.name.partition("[")[0]
            path = join(body.path, name)
            before = found[path].layers if path in found else []
            entering = found[path].entering if path in found else _entering(layers[0])
            found[path] = Loop(name, [*before, *layers], entering, layers[-1].outputs[-1])
    return found


def _entering(layer: Body) -> Value:
    """What the first layer of a stack reads of what is before it."""
    made = layer.outputs[-1]
    alike = [value for value in layer.inputs if value.type.rank == made.type.rank and value.shape[2:] == made.shape[2:]]
    found = next((value for value in alike if value.node is not None), None)
    if found is None:
        raise TargetError(f"{layer.path} reads nothing like what it makes")
    return found


def _alike(value: Value, made: Value) -> bool:
    return (
        value.type.rank == made.type.rank and value.shape[1:] == made.shape[1:] and value.type.dtype == made.type.dtype
    )


def _check_chain(layers: list[Body], path: str) -> None:
    """Each layer reads only the layer before it, of all layers."""
    made = {layer.outputs[0]: index for index, layer in enumerate(layers)}
    for index, layer in enumerate(layers):
        if any(made.get(value, index - 1) != index - 1 for value in layer.inputs):
            raise TargetError(f"{layer.path} reads what another layer of {path} than the one before it makes")


def _child(container: str, path: str) -> str | None:
    """The next part of the way from ``path`` to ``container``; None when it is that."""
    if container == path or not below(container, path):
        return None
    return container.removeprefix(path).lstrip(".").split(".")[0]


def _in_order(items: Sequence[Item], extras: Extras, path: str) -> list[Item]:
    """The items so that each comes after what it reads, otherwise as they are."""
    maker = {value: index for index, item in enumerate(items) for value in outputs_of(item)}
    done: dict[int, None] = {}
    while len(done) < len(items):
        ready = next((i for i in range(len(items)) if i not in done and _ready(items[i], i, maker, done, extras)), None)
        if ready is None:
            stuck = next(item for i, item in enumerate(items) if i not in done)
            raise TargetError(f"the parts of {path or 'the model'} need each other: {_shown(stuck)}")
        done[ready] = None
    return [items[index] for index in done]


def _ready(item: Item, index: int, maker: dict[Value, int], done: Iterable[int], extras: Extras) -> bool:
    return all(maker.get(value, index) in {*done, index} for value in inputs_of(item, extras))


def _shown(item: Item) -> str:
    return f"`{item.op.name}` in {item.scope}" if isinstance(item, Node) else item.name
