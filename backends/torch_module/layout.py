"""Where a graph's weights and operations live in a tree of modules, from the names and scopes that the graph has.

A *leaf* is a module with weights that does one operation (a linear map, a norm, a table). A *container* is a module
that holds others. An operation without weights belongs to the container that its scope lies in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from backends.torch_module.packing import OPERANDS, AnyScheme, scheme_of
from compiler.errors import TargetError
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import layer_of
from compiler.ir.roles import roles

LEAF_WEIGHTS: dict[str, dict[int, str]] = {
    "linear": {1: "weight", 2: "bias"},
    "embedding": {0: "weight"},
    "conv": {1: "weight", 2: "bias"},
    "rms_norm": {1: "weight"},
    "layer_norm": {1: "weight", 2: "bias"},
    "latent_attention": {3: "weight"},
    "rope_table": {1: "inv_freq"},
}
"""For each operation that can be a module of its own, which operands are its weights and what they are called there."""

PART_NAMES = {
    "attention.query": "q_proj",
    "attention.key": "k_proj",
    "attention.value": "v_proj",
    "mlp.gate": "gate_proj",
    "mlp.up": "up_proj",
}
"""What a part of a fused weight is called, by its role."""


@dataclass(frozen=True)
class Leaf:
    """A module that does one operation. ``weights`` are its parameters by attribute name."""

    path: str
    op: str
    weights: dict[str, Param]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def container(self) -> str:
        return parent(self.path)


@dataclass
class Layout:
    """The tree of modules. ``bare`` are the paths of parameters that no leaf holds; ``parts`` the words for modules
    with a stack of layers each, by path, where there are several; ``schemes`` say how packed weights are packed."""

    leaves: dict[Node, Leaf] = field(default_factory=dict[Node, Leaf])
    bare: dict[Param, str] = field(default_factory=dict[Param, str])
    container: dict[Node, str] = field(default_factory=dict[Node, str])
    parts: dict[str, str] = field(default_factory=dict[str, str])
    schemes: dict[Param, AnyScheme] = field(default_factory=dict[Param, AnyScheme])

    def part(self, path: str) -> str:
        """The word for the part that ``path`` lies in: "encoder", "decoder" or ""."""
        return next((word for prefix, word in self.parts.items() if below(path, prefix)), "")

    def named(self) -> dict[str, Param]:
        """Every attribute that holds a parameter, tied ones under each of their names, in order of first use."""
        found = {f"{leaf.path}.{name}": param for leaf in self.leaves.values() for name, param in leaf.weights.items()}
        return {**found, **{path: param for param, path in self.bare.items()}}


def parent(path: str) -> str:
    return path.rpartition(".")[0]


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def below(path: str, container: str) -> bool:
    """Whether ``path`` is ``container`` or lies within it."""
    return not container or path == container or path.startswith(f"{container}.")


def layout_of(graph: Graph, body: str | None, nodes: list[Node]) -> Layout:
    """The tree for ``nodes`` of ``graph``. What lies in the module ``body`` is moved to the module ``model``, unless it
    is None."""
    layout, taken = Layout(), dict[str, Param]()
    parts = roles(graph)
    for node in nodes:
        weights = _leaf_weights(node)
        if weights:
            first = next(iter(weights.values()))
            path = _free(_renamed(_leaf_path(node, first, parts), body), first, taken)
            layout.leaves[node] = Leaf(path, node.op.name, weights)
    paths = {leaf.path for leaf in layout.leaves.values()}
    for node in nodes:
        for param in _bare_params(node, layout):
            layout.bare.setdefault(param, _bare_path(_renamed(param.name, body), paths))
    containers = set(_containers(layout))
    for node in nodes:
        layout.container[node] = _container(node, layout, containers, body)
    layout.schemes = _schemes(layout)
    return layout


def _schemes(layout: Layout) -> dict[Param, AnyScheme]:
    """How each packed weight is. Raises TargetError when one is read otherwise than as a matrix."""
    found = {param: scheme for param in layout.named().values() if (scheme := scheme_of(param)) is not None}
    for param in found:
        for node in param.users:
            if any(value is param and i not in OPERANDS.get(node.op.name, ()) for i, value in enumerate(node.inputs)):
                raise TargetError(f"{param.name} is quantised, and no matrix of `{node.op.name}`", where=node.scope)
    return found


def _leaf_weights(node: Node) -> dict[str, Param]:
    """The parameters that make a module of ``node``; none when its first one is missing or computed."""
    names = LEAF_WEIGHTS.get(node.op.name, {})
    operands = {name: node.optional_input(index) for index, name in names.items()}
    given = {name: value for name, value in operands.items() if isinstance(value, Param)}
    computed = any(value is not None and name not in given for name, value in operands.items())
    return {} if computed or next(iter(names.values()), "") not in given else given


def _leaf_path(node: Node, weight: Param, parts: dict[Param, set[str]]) -> str:
    """The module that ``weight`` belongs to; of a fused weight's part, one beside it, named after what it does."""
    name = _name_in(node.scope, weight)
    if node.op.name == "rope_table":
        own = layer_of(node.scope) is not None and layer_of(name) is None
        return join(node.scope, "rotary_emb") if own else _rotary_path(name)
    if layer_of(parent(name)) is not None and layer_of(node.scope) is None:  # it stands before the stack now
        return join(node.scope, name.removesuffix(".weight").rpartition(".")[2])
    whole = re.fullmatch(r"(.+)\.weight", name)
    if whole:
        return whole[1]
    part = re.fullmatch(r"(.+?)[._](\d+)", name)
    base, number = (part[1], part[2]) if part else (name, "")
    prefix, _, stem = base.removesuffix(".weight").rpartition(".")
    role = next((PART_NAMES[role] for role in sorted(parts.get(weight, ())) if role in PART_NAMES), "")
    return join(prefix, role or "_".join(filter(None, (stem, number))))


def _name_in(scope: str, param: Param) -> str:
    """Of a tied parameter's names, the one that lies where it is used."""
    names = (param.name, *param.aliases)
    return next((name for name in names if scope and name.startswith(f"{scope}.")), param.name)


def _rotary_path(name: str) -> str:
    """`model.rotary_emb.inv_freq` is held by `model.rotary_emb`, and `..._local_inv_freq` beside it."""
    module, _, buffer = name.rpartition(".")
    kind = re.sub(r"_?(original_)?inv_freq.*", "", buffer)
    return join(parent(module), f"{kind}_rotary_emb") if kind else module


def _renamed(path: str, body: str | None) -> str:
    """``path`` in the generated tree. Numbered modules within a layer are parts of it, not layers: `layer_0`."""
    layer = layer_of(path)
    if layer is not None:
        rest = path.removeprefix(layer.scope)
        path = layer.scope + re.sub(r"\.(\d+)(?=\.|$)", r"_\1", rest)
    if body is None:
        return path
    if not body:
        return path if path.startswith("lm_head") else join("model", path)
    return f"model{path.removeprefix(body)}" if below(path, body) else path


def _free(path: str, weight: Param, taken: dict[str, Param]) -> str:
    """``path``, with a number when another weight has it."""
    choices = (path, *(f"{path}_{number}" for number in range(2, len(taken) + 3)))
    free = next(choice for choice in choices if taken.get(choice, weight) is weight)
    taken[free] = weight
    return free


def _bare_params(node: Node, layout: Layout) -> Iterator[Param]:
    held = layout.leaves[node].weights.values() if node in layout.leaves else ()
    for value in node.inputs:
        if isinstance(value, Param) and value not in held:
            yield value


def _bare_path(name: str, leaves: set[str]) -> str:
    """An attribute of the container that holds it: never of a leaf."""
    module, _, attribute = name.rpartition(".")
    while module in leaves or attribute[:1].isdigit():
        module, attribute = parent(module), f"{module.rpartition('.')[2]}_{attribute}"
    return join(module, attribute)


def _containers(layout: Layout) -> Iterator[str]:
    for path in (*(leaf.path for leaf in layout.leaves.values()), *layout.bare.values()):
        while path:
            path = parent(path)
            yield path


def _container(node: Node, layout: Layout, containers: set[str], body: str | None) -> str:
    if node in layout.leaves:
        return layout.leaves[node].container
    own = [layout.bare[value] for value in node.inputs if isinstance(value, Param) and value in layout.bare]
    scope = _renamed(node.scope, body) if node.scope else ""
    if own and below(parent(own[0]), scope):
        return parent(own[0])
    while scope not in containers:
        scope = parent(scope)
    return scope


def values_of(node: Node) -> list[Value]:
    """The operands that are no parameters."""
    return [value for value in node.inputs if value is not None and not isinstance(value, Param)]
