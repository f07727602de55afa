"""The statements of a module's ``forward``: what is used once is written where it is used while lines stay short."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from backends.torch_module.code import Code, names_in
from backends.torch_module.emitters import EMITTERS
from backends.torch_module.names import suggestion
from backends.torch_module.program import ATTENTION, Body, Call, Extras, Item, Loop, inputs_of
from backends.torch_module.stages import STAGE_EMITTERS
from backends.torch_module.token_emitters import TOKEN_EMITTERS
from compiler.errors import TargetError
from compiler.ir.graph import Node, Param, Value
from compiler.ir.types import Dim

ALL_EMITTERS = {**EMITTERS, **TOKEN_EMITTERS, **STAGE_EMITTERS}
LONGEST = 100
DEEPEST = 5
PLAIN = frozenset({"split_heads", "merge_heads", "reshape", "cast", "neg", "silu", "gelu", "relu", "mul", "add", "div"})


@dataclass
class Context:
    """What the statements of one class need from the rest of the module.

    ``parameter`` is how a parameter is reached, ``leaf`` the submodule that does an operation, ``weight`` its weight,
    ``dense`` the submodule of a linear map whose weight is not packed, ``held`` the parameters that a submodule has,
    ``size`` a number that may differ between instances, ``helper`` a function of the module, ``arguments`` and ``loop``
    say how submodules and stacks are called, ``cache`` which part of the cache is for the attention of tokens to those
    before, ``bits`` the code of how many bits that is rounded to ("" for none).
    """

    parameter: Callable[[Param], str]
    leaf: Callable[[Node], str | None]
    weight: Callable[[Node], str | None]
    dense: Callable[[Node], str | None]
    held: Callable[[Node], list[Param]]
    size: Callable[[int, str, int | None], str]
    helper: Callable[[str], str]
    arguments: Callable[[Call], list[Value | None]]
    loop: Callable[[Loop, dict[Value, str]], list[str]]
    rotation: str
    cache: str
    bits: str
    extras: Extras


@dataclass
class _Site:
    """An operation at one place of a body, as emitters see it."""

    forward: Forward
    index: int
    node: Node
    args: list[Code | None]

    def leaf(self) -> str | None:
        return self.forward.context.leaf(self.node)

    def weight(self) -> str | None:
        return self.forward.context.weight(self.node)

    def dense(self, node: Node) -> str | None:
        return self.forward.context.dense(node)

    def size(self, name: str, index: int | None = None) -> str:
        return self.forward.context.size(self.index, name, index)

    def dim(self, dim: Dim) -> str:
        return self.forward.dim(dim)

    def like(self, dtype: torch.dtype | None = None) -> str:
        return self.forward.like(dtype)

    @property
    def bits(self) -> str:
        return self.forward.context.bits

    @property
    def rotation(self) -> str:
        return (
            f"{self.forward.context.rotation}.matrix.to(hidden_states.dtype)" if self.forward.context.rotation else ""
        )

    def helper(self, name: str) -> str:
        return self.forward.context.helper(name)


@dataclass
class Forward:
    """Writes the statements of ``body`` given the names of its arguments."""

    body: Body
    names: dict[Value, str]
    context: Context
    lines: list[str] = field(default_factory=list[str])
    pending: dict[Value, Code] = field(default_factory=dict[Value, Code])

    def __post_init__(self) -> None:
        self.last_use: dict[Value, int] = {}
        self.uses: dict[Value, int] = {}
        for index, item in enumerate(self.body.items):
            for value in inputs_of(item, self.context.extras):
                self.last_use[value] = index
                self.uses[value] = self.uses.get(value, 0) + 1
        for value in self.body.outputs:
            self.last_use[value] = len(self.body.items)
            self.uses[value] = self.uses.get(value, 0) + 1
        self.arguments = dict(self.names)
        self.done: set[int] = set()

    def statements(self) -> list[str]:
        """All statements before ``return``."""
        for index, item in enumerate(self.body.items):
            if index not in self.done:
                self._item(index, item)
        return self.lines

    def result(self, value: Value) -> str:
        """An output as code."""
        return self._code(value).text

    def _item(self, index: int, item: Item) -> None:
        if isinstance(item, Loop):
            self._name(item.entering, index)
            names = {value: self._name(value, index) for value in inputs_of(item, self.context.extras)}
            self.lines += self.context.loop(item, names)
            self.names[item.leaving] = names[item.entering]
        elif isinstance(item, Call):
            self._call(index, item)
        elif item.op.name == "slice" and (parts := self._parts(item)):
            self._split(index, parts)
        else:
            self._operation(index, item)

    def _call(self, index: int, item: Call) -> None:
        def build(codes: Sequence[Code]) -> Code:
            return Code(f"self.{item.name}({', '.join(code.text for code in codes)})")

        values = self.context.arguments(item)
        self._bind(index, item.body.outputs, [value for value in values if value is not None], build)

    def _operation(self, index: int, node: Node) -> None:
        if node.op.name not in ALL_EMITTERS:
            raise TargetError(f"a generated module has no code for `{node.op.name}`", where=node.scope)
        if node.op.name in ATTENTION:
            self._attention(index, node)
        extras = self.context.extras
        values = extras.read_by(node)

        def build(codes: Sequence[Code]) -> Code:
            given = dict(zip(values, codes, strict=False))
            args = [self._operand(value, given, node) for value in node.inputs]
            args += [None] * (len(node.op.operands.split()) - len(args)) if "*" not in node.op.operands else []
            args += [given[value] for value in extras.of_node.get(node, ()) if value is not extras.cache]
            return ALL_EMITTERS[node.op.name](_Site(self, index, node, args))

        self._bind(index, node.outputs, values, build)

    def _operand(self, value: Value | None, given: dict[Value, Code], node: Node) -> Code | None:
        if isinstance(value, Param):
            return None if value in self.context.held(node) else Code(self.context.parameter(value))
        return None if value is None else given[value]

    def _attention(self, index: int, node: Node) -> None:
        """The cache takes what is new and gives back all that there is."""
        latent = node.op.name == "latent_attention"
        key, value = node.input(1), node.optional_input(2)
        self._name(node.input(0), index)
        if node in self.context.extras.crossing:
            self._cross(index, node)
            return
        names = self._name(key, index), self._name(value, index) if value else "_"
        if latent and self.context.rotation:
            self.lines.append(f"{names[0]} = {self.context.rotation}({names[0]})")
        stored = names[1] if value else f"{names[0]}[..., :0]"
        if self.context.extras.cache in self.context.extras.read_by(node):
            update = self._update(latent, f"{names[0]}, {stored}, self.layer_idx")
            self.lines += ["if past_key_values is not None:", f"    {names[0]}, {names[1]} = {update}"]

    def _update(self, latent: bool, given: str) -> str:
        """The call that gives the cache what is new."""
        bits = f", {self.context.bits}" if self.context.bits else ""
        if latent or bits:
            return f"{'update_latents' if latent else 'update_rounded'}({self.context.cache}, {given}{bits})"
        return f"{self.context.cache}.update({given})"

    def _cross(self, index: int, node: Node) -> None:
        """Keys and values of another sequence are made once; the cache has them for all later tokens."""
        made: list[str] = []
        for value in node.inputs[1:3]:
            assert value is not None  # attention has keys and values
            code = self.pending.pop(value, None)
            if code is not None:
                self.names[value] = self._free(value, index - 1)
                made.append(f"    {self.names[value]} = {code.text}")
        names = ", ".join(self.names[value] for value in node.inputs[1:3] if value is not None)
        states = f"{self.context.helper('cross_states')}(past_key_values, self.layer_idx)"
        self.lines += [
            f"states = {states}",
            "if states is None:",
            *made,
            "    if past_key_values is not None:",
            f"        past_key_values.cross_attention_cache.update({names}, self.layer_idx)",
            "else:",
            f"    {names} = states",
        ]

    def _bind(
        self, index: int, outputs: list[Value], values: Sequence[Value], build: Callable[[Sequence[Code]], Code]
    ) -> None:
        """Hold the code of an item back when it is used once, or assign it."""
        code = build([self._code(value) for value in values])
        while _too_long(code) and (held := [value for value in values if value in self.pending]):
            self._assign(index, max(held, key=lambda value: len(self.pending[value].text)))
            code = build([self._code(value) for value in values])
        for value in values:
            self.pending.pop(value, None)
        if len(outputs) == 1 and self.uses.get(outputs[0], 0) <= 1:
            self.pending[outputs[0]] = code
            return
        shown: list[str] = []
        for value in outputs:
            shown.append(self._free(value, index) if value in self.uses else "_")
            self.names[value] = shown[-1]
        self.lines.append(f"{', '.join(shown)} = {code.text}")

    def _code(self, value: Value) -> Code:
        return self.pending[value] if value in self.pending else Code(self.names[value])

    def _name(self, value: Value, index: int) -> str:
        """The variable that holds ``value``, assigned now if it was held back."""
        if value in self.pending:
            self._assign(index, value)
        return self.names[value]

    def _assign(self, index: int, value: Value) -> None:
        code = self.pending.pop(value)
        self.names[value] = self._free(value, index - 1)
        self.lines.append(f"{self.names[value]} = {code.text}")

    def _free(self, value: Value, dead: int, spent: Value | None = None) -> str:
        """A name for ``value`` that no variable has which is read after item ``dead`` (``spent`` is not)."""
        busy = {
            name for other, name in self.names.items() if self.last_use.get(other, -1) > dead and other is not spent
        }
        for held in self.pending.values():
            busy |= names_in(held.text)
        choices = suggestion(value, self.body, self.context.extras)
        numbered = (f"{choices[0]}_{number}" for number in range(2, len(self.names) + 3))
        return next(name for name in (*choices, *numbered) if name not in busy)

    # --- slices that take a tensor apart -------------------------------------------------------------------

    def _parts(self, node: Node) -> list[int]:
        """The places of all slices that, with ``node``, make up its operand along one axis."""
        source, axis = node.input(0), node.attr("axis")
        members = [
            place
            for place, item in enumerate(self.body.items)
            if isinstance(item, Node) and item.op.name == "slice" and item.input(0) is source
        ]
        nodes = [item for place in members if isinstance(item := self.body.items[place], Node)]
        plain = all(item.attr("axis") == axis and item.attr("step") == 1 for item in nodes)
        if not plain or len(nodes) < 2 or len(source.users) != len(nodes):
            return []
        members.sort(key=lambda place: self._start(place))
        ends = [0, *(self._stop(place) for place in members)]
        covered = [self._start(place) for place in members] == ends[:-1] and ends[-1] == source.shape[axis]
        return members if covered else []

    def _start(self, place: int) -> int:
        item = self.body.items[place]
        start = item.attr("start") if isinstance(item, Node) else 0
        return start if isinstance(start, int) else -1

    def _stop(self, place: int) -> int:
        item = self.body.items[place]
        stop = item.attr("stop") if isinstance(item, Node) else 0
        return stop if isinstance(stop, int) else -1

    def _split(self, index: int, places: list[int]) -> None:
        nodes = [item for place in places if isinstance(item := self.body.items[place], Node)]
        source = nodes[0].input(0)
        code = self._code(source)
        if len(code.text) > LONGEST - 20:
            self._assign(index, source)
            code = self._code(source)
        self.pending.pop(source, None)
        widths = ", ".join(self.context.size(place, "width", None) for place in places)
        axis = -1 if nodes[0].attr("axis") % source.type.rank == source.type.rank - 1 else nodes[0].attr("axis")
        split = Code(f"{code.atom}.split([{widths}], dim={axis})")
        shown: list[str] = []
        for node in nodes:
            shown.append(self._free(node.output, index, source))
            self.names[node.output] = shown[-1]
        self.lines.append(f"{', '.join(shown)} = {split.text}")
        self.done.update(places)

    # --- shapes --------------------------------------------------------------------------------------------

    def dim(self, dim: Dim) -> str:
        """A symbolic size from the shape of something that has a name."""
        for value, name in self.names.items():
            for axis, found in enumerate(value.shape):
                if found == dim:
                    return f"{name}.shape[{axis}]"
        parts = set(re.findall(r"[A-Za-z_]\w*", str(dim)))
        if dim in parts or "floor" in parts or "ceiling" in parts:
            raise TargetError(f"a generated module does not know the size {dim} in {self.body.path or 'the model'}")
        spaced = re.sub(r"(?<=\w)([-+*])", r" \1 ", str(dim))
        return re.sub(r"[A-Za-z_]\w*", lambda found: self.dim(found[0]), spaced)

    def like(self, dtype: torch.dtype | None) -> str:
        """A named tensor, of ``dtype`` where that is asked."""
        for value, name in self.names.items():
            if value.type.rank and dtype in (None, value.type.dtype) and not isinstance(value, Param):
                return name
        return ""


def _too_long(code: Code) -> bool:
    depth = deepest = 0
    for character in code.text:
        depth += (character in "([") - (character in ")]")
        deepest = max(deepest, depth)
    return len(code.text) > LONGEST or deepest > DEEPEST
