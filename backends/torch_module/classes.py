"""Modules with the same program are one class. Sizes do not count: they become arguments from the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from backends.torch_module.layout import Layout
from backends.torch_module.program import Body, Call, Extras, Item, Loop, inputs_of, outputs_of
from compiler.ir.graph import Node, Param, Value
from compiler.ir.layers import layer_of

SIZES = frozenset({"heads", "start", "stop", "shape", "count", "scale", "window", "keep"})
"""Attributes that hold sizes, or what follows from sizes. Any other constant is part of what a class is."""

WORDS = {
    "self_attn": "Attention",
    "attn": "Attention",
    "attention": "Attention",
    "self_attention": "Attention",
    "SelfAttention": "Attention",
    "encoder_attn": "CrossAttention",
    "EncDecAttention": "CrossAttention",
    "mlp": "MLP",
    "feed_forward": "MLP",
    "experts": "Experts",
}
ACTIVE = {"token_take": "Reducing", "token_merge": "Reducing", "latent_attention": "Latent", "experts": "Sparse"}


@dataclass
class ModuleClass:
    """A class and the modules that are instances of it, in order."""

    name: str
    bodies: list[Body] = field(default_factory=list[Body])

    @property
    def first(self) -> Body:
        return self.bodies[0]


def classes_of(model: Body, layout: Layout, extras: Extras) -> dict[str, ModuleClass]:
    """The class of every module within ``model`` (by path), innermost first. Layers of a stack are modules too."""
    by_key: dict[Any, ModuleClass] = {}
    found: dict[str, ModuleClass] = {}
    for body in _innermost_first(model):
        key = _key(body, found, layout, extras)
        module = by_key.setdefault(key, ModuleClass(""))
        module.bodies.append(body)
        found[body.path] = module
    _give_names(list(by_key.values()), layout)
    return found


def _innermost_first(body: Body) -> Iterator[Body]:
    for item in body.items:
        for inner in _bodies(item):
            yield from _innermost_first(inner)
            yield inner


def _bodies(item: Item) -> list[Body]:
    return [item.body] if isinstance(item, Call) else item.layers if isinstance(item, Loop) else []


def _key(body: Body, classes: dict[str, ModuleClass], layout: Layout, extras: Extras) -> Any:
    """What makes modules alike: a description with values and attributes by number."""
    numbers: dict[Value, int] = {}
    inputs = [(str(value.type.dtype), value.type.rank) for value in body.inputs]
    for value in body.inputs:
        numbers[value] = len(numbers)
    items: list[Any] = []
    for item in body.items:
        read = [numbers[value] for value in inputs_of(item, extras)]
        items.append((_what(item, body.path, classes, layout), read))
        for value in outputs_of(item):
            numbers[value] = len(numbers)
    return repr((layout.part(body.path), _place(body.path), inputs, items, [numbers[value] for value in body.outputs]))


def _what(item: Item, path: str, classes: dict[str, ModuleClass], layout: Layout) -> Any:
    if isinstance(item, Call):
        return "call", item.name, id(classes[item.body.path])
    if isinstance(item, Loop):
        return "loop", item.name, [id(classes[layer.path]) for layer in item.layers]
    attributes = [(name, _shown(name, item.attr(name))) for name in item.op.attrs]
    leaf = layout.leaves.get(item)
    held = (leaf.path.removeprefix(path), sorted(leaf.weights), _packed(leaf.weights, layout)) if leaf else ()
    operands = [_operand(value, path, layout) for value in item.inputs]
    return item.op.name, attributes, held, operands


def _shown(name: str, value: Any) -> Any:
    if name == "window":
        return "size"  # the mask, which is handed in, and the cache follow it; the attention itself does not
    if name not in SIZES:
        return str(value) if isinstance(value, torch.dtype) else value
    if isinstance(value, tuple):
        return [dim if isinstance(dim, str) or dim == 1 else "size" for dim in value]
    return value if isinstance(value, str) or value == 0 else "size"


def _packed(weights: Mapping[str, Param], layout: Layout) -> list[str]:
    held = ((name, layout.schemes.get(param)) for name, param in weights.items())
    return sorted(f"{type(scheme).__name__} {name}" for name, scheme in held if scheme is not None)


def _operand(value: Value | None, path: str, layout: Layout) -> str:
    if isinstance(value, Param) and value in layout.schemes:
        return f"{type(layout.schemes[value]).__name__} {layout.bare.get(value, '').removeprefix(path)}"
    if isinstance(value, Param):
        return layout.bare[value].removeprefix(path) if value in layout.bare else "weight"
    return "none" if value is None else "value"


def operations(body: Body) -> Iterator[Node]:
    """Every operation within a body."""
    for inner in body.walk():
        yield from (item for item in inner.items if isinstance(item, Node))


def _give_names(classes: list[ModuleClass], layout: Layout) -> None:
    by_base: dict[str, list[ModuleClass]] = {}
    for module in classes:
        path = module.first.path
        part = layout.part(path)
        beside = [other.first.path for other in classes if layout.part(other.first.path) == part]
        others = {_place(other) for other in beside if _base_name(other) == _base_name(path)}
        outer = path.split(".")[-2:-1] if len(others) > 1 and not path.rpartition(".")[2].isdigit() else []
        outer = [_base_name(name) for name in outer if not name.isdigit()]
        by_base.setdefault("".join([part.capitalize(), *outer, _base_name(path)]), []).append(module)
    stems = [(module, f"{_prefix(module, same)}{base}") for base, same in by_base.items() for module in same]
    free = {stem for _, stem in stems}
    taken: set[str] = set()
    for module, stem in stems:
        numbered = (f"{stem}{number}" for number in count(2))
        module.name = stem if stem not in taken else next(n for n in numbered if n not in free | taken)
        taken.add(module.name)


def _place(path: str) -> str:
    """Where in its layer, or in the model, a module is."""
    layer = layer_of(path)
    return path.removeprefix(layer.scope) if layer else path


def _base_name(path: str) -> str:
    last = path.rpartition(".")[2]
    if last.isdigit():
        return "Layer"
    return WORDS.get(last) or "".join(part[:1].upper() + part[1:] for part in last.split("_"))


def _prefix(module: ModuleClass, same: list[ModuleClass]) -> str:
    """What sets a class apart from others of its kind, in a word or two."""
    own = {node.op.name for node in operations(module.first)}
    others = [{node.op.name for node in operations(other.first)} for other in same if other is not module]
    words = [word for op, word in ACTIVE.items() if op in own and any(op not in other for other in others)]
    if "rope" not in own and any("rope" in other for other in others):
        words.append("Unrotated")
    return "".join(words)
