"""Reading the text of a graph; see ``compiler.ir.text`` and docs/graph.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compiler.errors import OpError, TextError
from compiler.ir.cursor import NAME, Cursor
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.opdef import Attr, OpDef
from compiler.ir.ops import op_named
from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply, load

_REFERENCE = rf"%\d+|{NAME}"


def parse_graph(text: str, path: Path = Path("<text>")) -> Graph:
    """The graph that ``text`` describes, folded layers written out. Raises TextError with the place.

    Parameters without an expression are bound to ``load("model", their name)`` in the dtype of the text.
    """
    return _Parser(text, path).graph()


def implied_scope(node: Node, weightless: str) -> tuple[str, str]:
    """The scope of a line without ``at``, and what ``weightless`` is for the next line.

    It is the module of the first weight; without weights, the scope of the weightless node before (``weightless``).
    """
    params = [value for value in node.inputs if isinstance(value, Param)]
    return (params[0].name.rpartition(".")[0], weightless) if params else (weightless, node.scope)


@dataclass
class _Frame:
    """Where names are relative to while a block is read."""

    base: str = ""
    index: int | None = None
    weightless: str = ""
    shared: dict[str, Expr] = field(default_factory=dict[str, Expr])

    def absolute(self, path: str) -> str:
        if path.startswith("/"):
            return path[1:]
        if path == ".":
            return self.base
        return f"{self.base}.{path}" if self.base else path


class _Parser:
    def __init__(self, text: str, path: Path) -> None:
        lines = [Cursor(path, number, line.rstrip()) for number, line in enumerate(text.splitlines(), 1)]
        self.lines = [line for line in lines if not line.done() and not line.peek("#")] or [Cursor(path, 1, "")]
        self.values: dict[str, Value] = {}
        self.built = Graph("")

    def graph(self) -> Graph:
        self._header(self.lines[0])
        end = next((i for i, line in enumerate(self.lines) if line.starts("return")), len(self.lines))
        if end + 1 >= len(self.lines):
            raise self.lines[-1].error("the graph should end with `return` and `}`")
        frame = _Frame()
        self._items(self.lines[1:end], frame)
        self._return(self.lines[end], frame)
        self.lines[end + 1].expect("}")
        for line in self.lines[end + 1 : end + 3]:
            line.finish()
        return self.built

    def _header(self, line: Cursor) -> None:
        line.expect("graph")
        self.built.name = line.name()
        line.expect("(")
        line.items(lambda: self._input(line), ")")
        line.expect("{")
        line.finish()

    def _input(self, line: Cursor) -> None:
        name = line.name()
        line.expect(":")
        self.values[name] = self.built.add_input(name, line.type())

    def _return(self, line: Cursor, frame: _Frame) -> None:
        line.expect("return")
        while not line.done():
            name = line.name()
            line.expect("=")
            value = self._operand(line, frame)
            if value is None:
                raise line.error(f"output `{name}` is none")
            self.built.outputs[name] = value
            if not line.done():
                line.expect(",")

    def _items(self, lines: list[Cursor], frame: _Frame) -> None:
        """Read lines and blocks, each from its beginning: the lines of a repeated block are read again and again."""
        position = 0
        while position < len(lines):
            line = replace(lines[position], at=0, index=frame.index)
            if line.starts("repeat") or line.starts("at"):
                frame.weightless = frame.base
                end = _block_end(lines, position)
                self._block(line, lines[position + 1 : end], frame)
                position = end
            else:
                self._line(line, frame)
            position += 1

    def _line(self, line: Cursor, frame: _Frame) -> None:
        if line.peek("}"):
            raise line.error("this closes nothing")
        if line.peek("$"):
            self._shared(line, frame)
        elif line.peek("@"):
            self._declaration(line, frame)
        else:
            self._node(line, frame)
        line.finish()

    def _block(self, header: Cursor, body: list[Cursor], frame: _Frame) -> None:
        if header.accept("at "):
            base = self._layer(header)
            header.expect("{")
            header.finish()
            self._items(body, _Frame(base, frame.index, base))
        else:
            self._repeat(header, body)

    def _layer(self, line: Cursor) -> str:
        return line.counted(line.take(r"[\w.\-{}+]+", "a module path"))

    def _repeat(self, header: Cursor, body: list[Cursor]) -> None:
        header.expect("repeat i in")
        first = header.integer()
        header.expect("..")
        stop = header.integer()
        step = header.integer() if header.accept("step ") else 1
        template = header.take(r"[\w.\-{}]+", "a module path with {i}") if header.accept("at ") else ""
        carries = header.items(lambda: self._carry(header), ")") if header.accept("(") else ()
        header.expect("{")
        header.finish()
        if step < 1:
            raise header.error("the step must be at least 1")
        for index in range(first, stop, step):
            self._carry_over(header, carries, index == first)
            base = replace(header, index=index).counted(template)
            self._items(body, _Frame(base, index, base))

    def _carry_over(self, header: Cursor, carries: tuple[tuple[str, str, str], ...], first: bool) -> None:
        sources = {name: initial if first else later for name, initial, later in carries}
        missing = [source for source in sources.values() if source not in self.values]
        if missing:
            raise header.error(f"`{missing[0]}` is not defined in the block")
        self.values.update({name: self.values[source] for name, source in sources.items()})

    def _carry(self, header: Cursor) -> tuple[str, str, str]:
        name = header.take(r"%\d+", "a value")
        header.expect("=")
        initial = self._known(header)
        header.expect("then")
        return name, initial, header.take(r"%\d+", "a value of the block")

    def _known(self, line: Cursor) -> str:
        name = line.string() if line.peek('"') else line.take(_REFERENCE, "a value")
        if name not in self.values:
            raise line.error(f"`{name}` is not defined above", start=line.at - len(name))
        return name

    def _operand(self, line: Cursor, frame: _Frame) -> Value | None:
        if line.peek("@"):
            return self._param(line, frame)
        if line.starts("none"):
            line.expect("none")
            return None
        return self.values[self._known(line)]

    def _param_head(self, line: Cursor, frame: _Frame) -> tuple[str, TensorType]:
        line.expect("@")
        name = frame.absolute(line.take(rf"/?{NAME}", "a parameter name"))
        line.expect(":")
        return name, line.type()

    def _param(self, line: Cursor, frame: _Frame) -> Param:
        start = line.skip()
        name, type = self._param_head(line, frame)
        if name not in self.built.params:
            return self.built.add_param(name, load("model", name, type), dtype=type.dtype)
        param = self.built.params[name]
        if param.type != type:
            raise line.error(f"parameter `{name}` is {param.type} above", start=start)
        return param

    def _declaration(self, line: Cursor, frame: _Frame) -> None:
        start = line.skip()
        name, type = self._param_head(line, frame)
        expr = self._expr(line, frame) if line.accept("=") else load("model", name, type)
        if expr.type.shape != type.shape:
            raise line.error(f"parameter `{name}` is {type}, but its expression makes {expr.type}", start=start)
        if name in self.built.params:
            raise line.error(f"parameter `{name}` is declared twice", start=start)
        options = self._options(line)
        storage = options.pop("storage", None)
        self.built.add_param(name, expr, storage, dtype=type.dtype, **options)
        frame.shared.clear()

    def _options(self, line: Cursor) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if line.accept("{"):
            line.items(lambda: options.update([self._assignment(line, ("storage", "aliases", "persistent"))]), "}")
        return options

    def _assignment(self, line: Cursor, names: tuple[str, ...] = ()) -> tuple[str, Any]:
        start = line.skip()
        name = line.take(r"\w+", "a name")
        if names and name not in names:
            raise line.error(f"unknown option `{name}`", f"one of {', '.join(names)}", start=start)
        line.expect("=")
        return name, line.value()

    def _shared(self, line: Cursor, frame: _Frame) -> None:
        name = line.take(r"\$\d+", "a name")
        line.expect("=")
        frame.shared[name] = self._expr(line, frame)

    def _expr(self, line: Cursor, frame: _Frame) -> Expr:
        start = line.skip()
        if line.peek("$"):
            name = line.take(r"\$\d+", "a name")
            if name not in frame.shared:
                raise line.error(f"`{name}` is not defined above", start=start)
            return frame.shared[name]
        op = line.take(r"[A-Za-z]\w*", "a weight expression")
        line.expect("(")
        if op == "load":
            return self._load(line)
        args: list[Expr] = []
        attrs: dict[str, Any] = {}
        line.items(lambda: self._expr_part(line, frame, args, attrs), ")")
        return _checked(line, start, lambda: apply(op, args, attrs))

    def _load(self, line: Cursor) -> Expr:
        source = line.string()
        line.expect(",")
        key = line.string()
        line.expect("):")
        return load(source, key, line.type())

    def _expr_part(self, line: Cursor, frame: _Frame, args: list[Expr], attrs: dict[str, Any]) -> None:
        if re.match(r"\w+=", line.text[line.skip() :]):
            attrs.update([self._assignment(line)])
        else:
            args.append(self._expr(line, frame))

    def _node(self, line: Cursor, frame: _Frame) -> None:
        results = [line.take(r"%\d+", "a value")]
        while line.accept(","):
            results.append(line.take(r"%\d+", "a value"))
        line.expect("=")
        start = line.skip()
        op = _checked(line, start, op_named, line.take(r"\w+", "an operation"))
        line.expect("(")
        operands = line.items(lambda: self._operand(line, frame), ")")
        attrs = self._attrs(line, op)
        node = _checked(line, start, lambda: self.built.append(op.name, operands, attrs))
        self._types(line, node, results)
        implied, _ = implied_scope(node, frame.weightless)
        node.scope = frame.absolute(line.take(r"\S+", "a module path")) if line.accept("at ") else implied
        _, frame.weightless = implied_scope(node, frame.weightless)
        self.values.update(zip(results, node.outputs, strict=True))

    def _types(self, line: Cursor, node: Node, results: list[str]) -> None:
        line.expect(":")
        start = line.skip()
        stated = [line.type()]
        while line.accept(","):
            stated.append(line.type())
        inferred = [value.type for value in node.outputs]
        if stated != inferred or len(results) != len(inferred):
            shown = ", ".join(map(str, inferred))
            raise line.error(f"`{node.op.name}` gives {len(inferred)} values: {shown}", start=start)

    def _attrs(self, line: Cursor, op: OpDef) -> Mapping[str, Any]:
        attrs: dict[str, Any] = {}
        if line.accept("{"):
            line.items(lambda: attrs.update([self._attr(line, op)]), "}")
        return attrs

    def _attr(self, line: Cursor, op: OpDef) -> tuple[str, Any]:
        start = line.skip()
        name = line.take(r"\w+", "an attribute")
        if name not in op.attrs:
            raise line.error(f"`{op.name}` has no attribute `{name}`", f"it has: {', '.join(op.attrs)}", start=start)
        return name, _attr_value(line, op.attrs[name]) if line.accept("=") else True


def _block_end(lines: list[Cursor], start: int) -> int:
    """Where the block that ``lines[start]`` opens is closed."""
    depth = 0
    for position in range(start, len(lines)):
        text = lines[position].text.strip()
        depth += text.endswith("{") - (text == "}")
        if depth == 0:
            return position
    raise lines[start].error("this block is never closed")


def _attr_value(line: Cursor, spec: Attr) -> Any:
    if spec.kind not in ("dim", "dims") or line.peek("none"):
        return line.value()
    return line.dim() if spec.kind == "dim" else line.dims()


def _checked(line: Cursor, start: int, build: Callable[..., Any], *args: Any) -> Any:
    try:
        return build(*args)
    except TextError:
        raise
    except (OpError, ValueError) as reason:
        cause = reason.cause if isinstance(reason, OpError) else str(reason)
        remedy = reason.remedy if isinstance(reason, OpError) else ""
        raise line.error(cause, remedy, start=start) from reason
