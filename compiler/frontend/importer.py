"""From an exported program to a graph: values, parameters, symbolic dims, and in-place writes made functional.

The program may write into tensors (``copy_``, ``div_``, ``scatter_``). Here a write only rebinds names: the tensor
written to, the tensors it is a slice of, and every other view of those, which is derived again when next read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from compiler.errors import CaptureError, OpError
from compiler.frontend.aten import HANDLERS, TAKES_COMPLEX, Complex, Masking
from compiler.frontend.aten.placed import Sample
from compiler.frontend.params import rebind
from compiler.frontend.subject import Subject
from compiler.ir.graph import Graph, Param, Value
from compiler.ir.types import Dim, TensorType, canonical_dim, resolve_dim
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import literal


class Importer:
    """Builds the graph of one program. The handlers in ``aten`` call ``emit`` and read ``out`` and ``scope``.

    ``sizes`` are those of symbolic dims in the trace. ``joins``: a batch was taken apart and put together.
    """

    def __init__(self, subject: Subject, program: ExportedProgram) -> None:
        self.subject = subject
        self.program = program
        self.graph = Graph(type(subject.module).__name__, subject.origin)
        self.graph.sources.update(subject.sources)
        self.scope = ""
        self.out = TensorType(torch.float32, ())
        signature = program.graph_signature
        self._weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._constants = signature.inputs_to_lifted_tensor_constants
        self._known: dict[fx.Node, Any] = {}
        self._aliases: dict[str, tuple[str, ...]] = {}
        for other, first in subject.names.items():
            if other != first:
                self._aliases[first] = (*self._aliases.get(first, ()), other)
        self._views: dict[fx.Node, dict[fx.Node, None]] = {}
        self._written: set[fx.Node] = set()
        self._rows_of: dict[tuple[int, ...], Param] = {}
        self._dims: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.joins = False

    def run(self) -> Graph:
        """The graph of the program, not yet lifted. Raises CaptureError naming what cannot be imported, and where."""
        signature = self.program.graph_signature
        if signature.buffers_to_mutate:
            raise CaptureError(f"the model writes to its buffer `{next(iter(signature.buffers_to_mutate.values()))}`")
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self._read(node)
            elif node.op == "output":
                self._outputs(node)
        return self.graph

    # --- what handlers use ----------------------------------------------------------------------------------

    def emit(self, op: str, *inputs: Value | None, **attrs: Any) -> Value:
        """Append an operation in the current scope."""
        return self.graph.op(op, inputs, attrs, scope=self.scope)

    def emit_all(self, op: str, *inputs: Value | None, **attrs: Any) -> list[Value]:
        """Append an operation with several outputs."""
        return self.graph.append(op, inputs, attrs, scope=self.scope).outputs

    def fail(self, cause: str, remedy: str = "") -> CaptureError:
        """An error at the current scope, to raise."""
        return CaptureError(cause, where=self.scope or type(self.subject.module).__name__, remedy=remedy)

    def rebind(self, value: Value, change: Callable[[Expr], Expr]) -> Param:
        """Replace a parameter by one whose expression is ``change`` of its own."""
        if not isinstance(value, Param) or value.users:
            raise self.fail("a weight in another layout must be a parameter that nothing else reads")
        param = rebind(self.graph, value, change(value.expr))
        self._known.update({node: param for node, known in self._known.items() if known is value})
        return param

    # --- placeholders ---------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self._weights:
            self._known[node] = self._param(self._weights[node.name])
        elif node.name in self._constants:
            self._known[node] = self._constant(self._constants[node.name])
        elif isinstance(node.meta["val"], Tensor):
            self._known[node] = self._input(node)

    def _param(self, path: str) -> Param:
        name = self.subject.names[path]
        if name in self.graph.params:
            return self.graph.params[name]
        aliases = self._aliases.get(name, ())
        expr = next((self.subject.weights[n] for n in (name, *aliases) if n in self.subject.weights), None)
        if expr is None:
            raise CaptureError("no checkpoint tensor is bound to this parameter", where=name)
        return self.graph.add_param(name, expr, aliases=aliases, persistent=name not in self.subject.transient)

    def _constant(self, name: str) -> Param:
        value = self.program.constants[name]
        if not isinstance(value, Tensor) or value.is_meta:
            raise CaptureError("a constant of the program has no value", where=name)
        expr = literal(value.flatten().tolist(), value.shape, value.dtype)
        return self.graph.add_param(f"constants.{name}", expr, persistent=False)

    def _input(self, node: fx.Node) -> Value:
        names, sizes = self.subject.dims[node.name], node.meta["val"].shape
        for axis, name in names.items():
            if isinstance(sizes[axis], torch.SymInt):
                self._dims[str(sizes[axis].node.expr)] = name if name.isidentifier() else f"({name})"
                self.sizes[name] = int(sizes[axis].node.hint)
            elif axis == 0:
                raise CaptureError(f"the model only accepts a batch of {sizes[0]}", where=node.name)
        return self.graph.add_input(node.name, self._type(node.meta["val"]))

    def _outputs(self, node: fx.Node) -> None:
        values = [self._read(argument) for argument in cast("tuple[fx.Node, ...]", node.args[0])]
        for name, value in zip(_output_names(self.program, len(values)), values, strict=True):
            if isinstance(value, Value):
                self.graph.outputs[name] = value
            elif isinstance(value, Sample):
                raise CaptureError("one sample of a batch is not in the graph's vocabulary", where=name)

    # --- types ----------------------------------------------------------------------------------------------

    def _type(self, tensor: Tensor) -> TensorType:
        dtype = torch.float32 if tensor.dtype == torch.complex64 else tensor.dtype
        return TensorType(dtype, tuple(self._dim(size) for size in tensor.shape))

    def _dim(self, size: int | torch.SymInt) -> Dim:
        if isinstance(size, int):
            return size
        text = str(size.node.expr).replace("//", "_floordiv_")
        for symbol, name in self._dims.items():
            text = text.replace(symbol, name)
        try:
            return canonical_dim(text)
        except ValueError as reason:  # what sympy raises
            raise self.fail(f"the size {size.node.expr} is not in the graph's vocabulary") from reason

    # --- operations -----------------------------------------------------------------------------------------

    def _read(self, node: fx.Node) -> Any:
        """What a node of the program stands for now, importing it when it is new or its base was written to."""
        if node not in self._known:
            self._known[node] = self._import(node)
        return self._known[node]

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            value = argument.meta.get("val")
            return self._dim(value) if isinstance(value, torch.SymInt) else self._read(argument)
        if isinstance(argument, list | tuple):
            return [self._argument(item) for item in cast("list[Any]", argument)]
        return argument

    def _import(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            return None
        schema: Any = getattr(node.target, "_schema", None)
        if _is_view(node):
            self._views.setdefault(cast("fx.Node", node.args[0]), {})[node] = None
        if node.target is operator.getitem:
            return self._argument(node.args[0])[node.args[1]]
        if schema is not None and schema.is_mutable:
            return self._write(node, schema.name.partition("::")[2].removesuffix("_"))
        name = str(node.target).split(".")
        return self._call(node, name[1] if len(name) > 1 else name[0])

    def _call(self, node: fx.Node, name: str) -> Any:
        args, kwargs = self._argument(node.args), {k: self._argument(v) for k, v in node.kwargs.items()}
        # Only now: reading an argument may have imported another node.
        self.scope = scope_of(node)
        if isinstance(node.meta.get("val"), Tensor):
            self.out = self._type(node.meta["val"])
        handler = HANDLERS.get(name)
        if isinstance(node.meta.get("val"), Tensor) and any(map(_is_read_out, node.all_input_nodes)):
            raise self.fail(
                "a number that is computed, and then taken for a constant, is not in the graph's vocabulary"
            )
        if handler is None:
            raise self.fail(f"the operation `{node.target}` is not in the graph's vocabulary")
        if name != "attention" and any(isinstance(argument, Masking) for argument in (*args, *kwargs.values())):
            raise self.fail(
                "attention that reads its mask itself is not in the graph's vocabulary",
                "capture takes models whose attention goes through transformers' attention interface",
            )
        try:
            result = _apply(partial(handler, self), args, kwargs, whole=name in TAKES_COMPLEX)
        except (OpError, TypeError, AttributeError, ValueError, IndexError) as reason:
            raise self.fail(f"the operation `{node.target}` cannot be imported: {reason}") from reason
        self._check(node, result)
        return result

    def _check(self, node: fx.Node, result: Any) -> None:
        """Our type inference must agree with what torch traced."""
        value = node.meta["val"]
        if isinstance(value, Tensor) and isinstance(result, Value) and not self._agree(result.type, self._type(value)):
            raise self.fail(f"`{node.target}` is {self._type(value)}, but its import is {result.type}")

    def _agree(self, own: TensorType, traced: TensorType) -> bool:
        """Whether a type is the one traced. Samples that were joined again have a size there, that of its batch."""
        if not self.joins or own.dtype != traced.dtype or own.rank != traced.rank:
            return own == traced
        pairs = zip(own.shape, traced.shape, strict=True)
        return all(one == other or (isinstance(other, int) and self._sized(one) == other) for one, other in pairs)

    def _sized(self, dim: Dim) -> int:
        return resolve_dim(dim, self.sizes)

    # --- writes ---------------------------------------------------------------------------------------------

    def _write(self, node: fx.Node, name: str) -> Value:
        """Run a writing operation once; read again later, it stands for what its target has become."""
        target = cast("fx.Node", node.args[0])
        if node in self._written:
            return self._read(target)
        self._written.add(node)
        written = self._call(node, name)
        self._rebind_written(target, written)
        return written

    def _rebind_written(self, target: fx.Node, written: Value) -> None:
        if target.name in self._weights:
            raise self.fail("the model writes to one of its parameters")
        base = cast("fx.Node", target.args[0]) if target.args else target
        if target in self._views.get(base, ()):
            self._rebind_written(base, self._in_base(target, written))
        self._forget_views(target)
        self._known[target] = written

    def _in_base(self, view: fx.Node, written: Value) -> Value:
        """The base of a view after the view was written to."""
        if view in self._written or view.target is torch.ops.aten.alias.default:
            return written
        base: Value = self._read(cast("fx.Node", view.args[0]))
        given = self._argument(view.args[1:])
        if view.target is torch.ops.aten.select.int:
            axis, index = cast("tuple[int, int]", given)
            axis, size = axis % base.type.rank, base.shape[axis]
            index = index % size if isinstance(size, int) else index
            one = self.emit("reshape", written, shape=(*written.shape[:axis], 1, *written.shape[axis:]))
            return self._spliced(base, one, axis, index, index + 1, 1)
        if view.target is torch.ops.aten.slice.Tensor:
            axis, start, stop, step = cast(
                "tuple[int, Dim | None, Dim | None, int]", (*given, *(0, None, None, 1)[len(given) :])
            )
            return self._spliced(base, written, axis % base.type.rank, start, stop, step)
        raise self.fail(f"a write through `{view.target}` cannot be followed")

    def _forget_views(self, base: fx.Node) -> None:
        for view in self._views.get(base, ()):
            self._known.pop(view, None)
            self._forget_views(view)

    def _spliced(self, base: Value, written: Value, axis: int, start: Dim | None, stop: Dim | None, step: int) -> Value:
        """``base`` with a slice of it replaced, as a concatenation; with every ``step``-th index, as rows of both."""
        size = base.shape[axis]
        if written.shape == base.shape and step == 1:
            return written
        if not isinstance(size, int) or isinstance(start, str) or isinstance(stop, str):
            raise self.fail("a write to a symbolic slice cannot be followed")
        start, stop, step = slice(start, stop, step).indices(size)
        places = range(start, max(start, stop), step)
        if not places:
            return base
        if step != 1:
            rows = list(range(size))
            rows[start:stop:step] = range(size, size + len(places))
            return self.emit("take", self.emit("concat", base, written, axis=axis), self._rows(rows), axis=axis)
        parts = [self.emit("slice", base, axis=axis, start=0, stop=start)] if start else []
        parts.append(written)
        parts += [self.emit("slice", base, axis=axis, start=stop, stop=size)] if stop < size else []
        return self.emit("concat", *parts, axis=axis) if len(parts) > 1 else written

    def _rows(self, rows: list[int]) -> Param:
        """Numbers of rows, int64 [rows], the same ones where they are asked for again."""
        if tuple(rows) not in self._rows_of:
            name, expr = f"constants.rows_{len(self._rows_of)}", literal(rows, (len(rows),), torch.int64)
            self._rows_of[tuple(rows)] = self.graph.add_param(name, expr, persistent=False)
        return self._rows_of[tuple(rows)]


def _apply(handler: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any], *, whole: bool) -> Any:
    """Call a handler; with complex operands, on the real and imaginary parts unless it takes them ``whole``."""
    if whole or not any(isinstance(argument, Complex) for argument in args):
        return handler(*args, **kwargs)
    parts = [[a[index] if isinstance(a, Complex) else a for a in args] for index in (0, 1)]
    return Complex(handler(*parts[0], **kwargs), handler(*parts[1], **kwargs))


def _is_read_out(node: fx.Node) -> bool:
    """Whether a node is a number of Python that only a run knows, or is worked out from sizes."""
    return isinstance(node.meta.get("val"), torch.SymFloat | torch.SymBool)


def _is_view(node: fx.Node) -> bool:
    """Whether a node's result shares memory with its first argument."""
    if node.target is operator.getitem:
        return _is_view(cast("fx.Node", node.args[0]))
    schema: Any = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.arguments) and schema.arguments[0].alias_info is not None


def scope_of(node: fx.Node) -> str:
    """The path of the module that computes a node; empty for the outermost."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return "" if path.startswith("_empty") else path


def _output_names(program: ExportedProgram, count: int) -> list[str]:
    """A name for each flat output: the fields of the model's output, or ``output``, ``output.0``."""
    spec: Any = program.call_spec.out_spec
    names: dict[int, str] = {}
    _name_outputs(pytree.tree_unflatten(list(range(count)), spec), "", names)
    return [names[index] for index in range(count)]


def _name_outputs(tree: Any, prefix: str, names: dict[int, str]) -> None:
    if isinstance(tree, int):
        names[tree] = prefix or "output"
    elif isinstance(tree, Mapping):
        for key, item in cast("Mapping[str, Any]", tree).items():
            _name_outputs(item, f"{prefix}.{key}" if prefix else key, names)
    elif isinstance(tree, list | tuple):
        for index, item in enumerate(cast("list[Any]", tree)):
            _name_outputs(item, f"{prefix or 'output'}.{index}", names)
