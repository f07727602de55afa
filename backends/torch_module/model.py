"""What the classes of one generated model share, and what their modules are called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from backends.torch_module.classes import ModuleClass
from backends.torch_module.layout import Layout
from backends.torch_module.names import argument_name
from backends.torch_module.program import Body, Extras, Loop
from backends.torch_module.sizes import Sizes
from compiler.ir.graph import Value
from compiler.weights.source import Source

ORDER = (
    "input_ids",
    "pixel_values",
    "hidden_states",
    "encoder_hidden_states",
    "cos",
    "sin",
    "position_ids",
    "attention_mask",
    "encoder_attention_mask",
    "past_key_values",
)

Argument = tuple[str, Value | None]


@dataclass
class Model:
    """Everything about one generated model that its classes share. ``paired`` models are an encoder and a decoder;
    ``helpers`` collects what classes use."""

    prefix: str
    layout: Layout
    extras: Extras
    sizes: Sizes
    classes: dict[str, ModuleClass]
    stacks: dict[str, Loop]
    sources: Mapping[str, Source]
    cache_bits: int = 0
    paired: bool = False
    helpers: set[str] = field(default_factory=set[str])

    def arguments(self, body: Body) -> list[Argument]:
        """What a module is called with, by name. Layers of one stack all take the same, used or not."""
        stack = self.stacks.get(body.path.rpartition(".")[0])
        own = self._named(body, stack)
        if stack is None:
            return own
        if len(body.outputs) > 1:  # it is called by itself
            return own
        alike = [layer for layer in stack.layers if len(layer.outputs) == 1]
        names = {name for layer in alike for name, _ in self._named(layer, stack)}
        given = dict(own)
        return [(name, given.get(name)) for name in sorted(names, key=_place)]

    def _named(self, body: Body, stack: Loop | None) -> list[Argument]:
        made = {value for layer in stack.layers for value in layer.outputs} if stack else set[Value]()
        carried = {value for value in made if value.type.rank == 3} | ({stack.entering} if stack else set[Value]())
        found: dict[str, Value] = {}
        for value in sorted(body.inputs, key=lambda value: value not in carried):
            kind = "hidden_states" if value in carried else argument_name(value, body, self.extras)
            name = next(n for n in (kind, *(f"{kind}_{i}" for i in range(2, 99))) if n not in found)
            found[name] = value
        return sorted(found.items(), key=lambda pair: _place(pair[0]))


def _place(name: str) -> tuple[int, str]:
    base = name.rstrip("0123456789").rstrip("_")
    return (ORDER.index(base) if base in ORDER else len(ORDER)), name
