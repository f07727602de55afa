"""The classes at the top of a generated model: how its stack is run, and what is before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from backends.torch_module.classes import ModuleClass
from backends.torch_module.code import call
from backends.torch_module.forward import Forward
from backends.torch_module.model import Model
from backends.torch_module.module import ClassWriter
from backends.torch_module.program import Body, Call, Loop
from compiler.errors import TargetError
from compiler.ir.graph import Node, Value


class TopWriter(ClassWriter):
    """``__init__`` and ``forward`` statements of a class whose frame a template has."""

    def __init__(self, model: Model, body: Body, names: dict[Value, str], tokens: str = "input_ids") -> None:
        """``names`` has what the frame knows, be it made by operations of ``body``; ``tokens`` have the length."""
        super().__init__(model, ModuleClass("", [body]))
        self.names = names
        self.tokens = tokens
        self.tables: list[Node] = []

    def statements(self) -> tuple[list[str], str]:
        """The statements of forward, and its result as code."""
        body = self.module.first
        self.tables = self._varying_tables(body)
        names = {value: "" for table in self.tables for value in table.outputs} | self.names
        forward = Forward(body, names, self.context())
        nodes = {index: item for index, item in enumerate(body.items) if isinstance(item, Node)}
        forward.done |= {index for index, node in nodes.items() if all(value in names for value in node.outputs)}
        lines = forward.statements()
        return lines, forward.result(body.outputs[0])

    def all_statements(self, outputs: Mapping[str, Value]) -> tuple[list[str], dict[str, str]]:
        """The statements of forward, and the code of each output by name."""
        context = replace(self.context(), loop=super().loop_lines)  # without a cache, layers get what they read
        forward = Forward(self.module.first, dict(self.names), context)
        lines = forward.statements()
        return lines, {name: forward.result(value) for name, value in outputs.items()}

    # --- what differs between the layers of a stack ------------------------------------------------------------

    def _varying_tables(self, body: Body) -> list[Node]:
        """The rotary tables of which layers of one loop read different ones."""
        loops = [item for item in body.items if isinstance(item, Loop)]
        tables = [item for item in body.items if isinstance(item, Node) and item.op.name == "rope_table"]
        read = [{table for table in tables if any(_reads(layer, table) for layer in loop.layers)} for loop in loops]
        varying = {table for found in read if len(found) > 1 for table in found}
        return [table for table in tables if table in varying]

    def loop_lines(self, loop: Loop, names: dict[Value, str]) -> list[str]:
        """The layers one after another, each with the mask and the rotary table it attends with."""
        before: list[str] = []
        choices: list[tuple[str, str]] = []
        inside: list[str] = []
        masks = self.model.extras.masks
        if len(masks) > 1:
            before.append("windows = self.config.attention_windows")
            choices.append(("window", "windows"))
        if self.tables:
            before += self._table_lines()
            choices.append(("kind", "self.config.rotary_kinds"))
            self._note_tables(loop)
            inside.append("cos, sin = tables[kind]")
        passed = [self._passed(loop, index, names) for index in range(len(self.model.arguments(loop.layers[0])))]
        inside += call(0, f"{names[loop.entering]} = layer(", passed)
        head = f"for layer in {self.run_of(loop)}:"
        if choices:
            targets = ", ".join(["layer", *(target for target, _ in choices)])
            sources = ", ".join([self.run_of(loop), *(source for _, source in choices)])
            head = f"for {targets} in zip({sources}, strict=True):"
        return [*before, head, *(f"    {line}" for line in inside)]

    def _passed(self, loop: Loop, index: int, names: dict[Value, str]) -> str:
        """What stands for one argument of the layers."""
        arguments = [self.model.arguments(layer)[index] for layer in loop.layers]
        name = arguments[0][0]
        given = {value for _, value in arguments if value is not None}
        if name == "hidden_states":
            return names[loop.entering]
        if given <= set(self.model.extras.masks.values()):
            return names[given.pop()] if len(self.model.extras.masks) == 1 else "masks[window]"
        if given <= {value for table in self.tables for value in table.outputs}:
            return name
        if len(given) > 1:
            raise TargetError(f"the layers of {loop.name} read different values as {name}")
        return names[given.pop()]

    def _table_lines(self) -> list[str]:
        leaves = [self.model.layout.leaves[table] for table in self.tables]
        entries = [f'"{leaf.name}": self.{leaf.name}(position_ids)' for leaf in leaves]
        return call(0, "tables = {", entries, "}")

    def _note_tables(self, loop: Loop) -> None:
        for layer in loop.layers:
            used = next((table for table in self.tables if _reads(layer, table)), self.tables[0])
            self.model.sizes.note("rotary_kinds", layer.path, self.model.layout.leaves[used].name)


def _reads(layer: Body, table: Node) -> bool:
    return any(value in layer.inputs for value in table.outputs)


def without_call(body: Body, name: str) -> Body:
    """``body`` without the submodule ``name``, which a template calls itself."""
    return replace(body, items=[item for item in body.items if not isinstance(item, Call) or item.name != name])
