"""An ONNX graph in the making: nodes, constants, tensors in files, and sizes known at run time only."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor

from backends.onnx.cache import Cache
from backends.onnx.fusion import Fusions
from backends.onnx.masks import Masks
from backends.onnx.target import CONTRIB, Target
from compiler.errors import TargetError
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.types import Dim, TensorType, named_multiple
from compiler.weights.expr import Expr, apply
from compiler.weights.ops.basic import cast
from compiler.weights.ops.codec import is_quantised

if TYPE_CHECKING:
    from backends.onnx.stages import Stages

DENSE = "quantised weights are written dense, in float32: nothing multiplies by their codes there"
DTYPES: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file: the bytes of ``expr``, read as ``dtype`` and ``shape``."""

    name: str
    expr: Expr
    dtype: ir.DataType
    shape: tuple[int, ...]
    value: ir.Value


@dataclass
class Builder:
    """Appends ONNX nodes. ``values`` are the ONNX values of the graph's; ``axes`` the names of its symbolic dims.

    ``notes`` tell the user what was done differently than the graph says. ``accuracy`` is that of products with
    quantised weights: 0 takes inputs as they are, 4 rounds them to int8. Without ``rounds`` activations that the graph
    rounds are taken as they are. ``many``: it is for many tokens at a time, whose products with codes are of int8.
    ``unrounded`` are the weights whose products take their inputs as they are in any case.
    """

    graph: Graph
    target: Target
    axes: dict[str, str]
    values: dict[Value, ir.Value] = field(default_factory=dict[Value, ir.Value])
    nodes: list[ir.Node] = field(default_factory=list[ir.Node])
    constants: dict[Any, ir.Value] = field(default_factory=dict[Any, ir.Value])
    stored: dict[Any, Stored] = field(default_factory=dict[Any, Stored])
    sizes: dict[str, ir.Value] = field(default_factory=dict[str, ir.Value])
    accuracy: int = 4
    rounds: bool = True
    many: bool = False
    unrounded: frozenset[str] = frozenset()
    notes: dict[str, int] = field(default_factory=dict[str, int])
    scope: str = ""
    cache: Cache | None = None
    fusions: Fusions = field(default_factory=Fusions)
    head: Node | None = None
    kept: ir.Value | None = None
    stages: Stages | None = None
    last: ir.Value | None = None
    shared: dict[str, Sequence[ir.Value]] = field(default_factory=dict[str, Sequence[ir.Value]])

    def __post_init__(self) -> None:
        self._names: dict[str, int] = {}
        self.masks = Masks(self)

    def inner(self) -> Builder:
        """A builder for the body of one of this one's nodes: its names are not taken here."""
        made = Builder(self.graph, self.target, self.axes, scope=self.scope)
        made._names = self._names
        return made

    # --- nodes ---------------------------------------------------------------------------------------------------

    def op(self, name: str, *inputs: ir.Value | None, domain: str = "", **attrs: Any) -> ir.Value:
        """``name`` of ONNX with one result. An absent operand is None."""
        return self.ops(name, *inputs, count=1, domain=domain, **attrs)[0]

    def contrib(self, name: str, *inputs: ir.Value | None, **attrs: Any) -> ir.Value:
        """An operation of ONNX Runtime's own with one result."""
        return self.op(name, *inputs, domain=CONTRIB, **attrs)

    def ops(
        self, name: str, *inputs: ir.Value | None, count: int, domain: str = "", **attrs: Any
    ) -> Sequence[ir.Value]:
        """``name`` of ONNX with ``count`` results."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        label = self.fresh(f"{self.scope}/{name}" if self.scope else name)
        node = ir.node(name, given, attrs, domain=domain, num_outputs=count, name=label)
        for index, value in enumerate(node.outputs):
            value.name = label if count == 1 else f"{label}.{index}"
        self.nodes.append(node)
        return node.outputs

    def fresh(self, name: str) -> str:
        """``name``, or with a number where there is one of that name."""
        number = self._names.get(name, 0)
        self._names[name] = number + 1
        return f"{name}_{number}" if number else name

    def arg(self, node: Node, index: int) -> ir.Value:
        """A required operand of ``node``; a weight in its compute dtype."""
        return self.value(node.input(index))

    def optional(self, node: Node, index: int) -> ir.Value | None:
        value = node.optional_input(index)
        return None if value is None else self.value(value)

    def value(self, value: Value) -> ir.Value:
        if isinstance(value, Param):
            return self.weight(value)
        return self.values[value]

    def bind(self, value: Value, made: ir.Value) -> None:
        """Let ``made`` stand for ``value``, and have its type."""
        self.values[value] = made
        if made.type is None:
            made.type = ir.TensorType(self.kind(value.type.dtype))
            made.shape = self.named_shape(value.type)

    def kind(self, dtype: torch.dtype) -> ir.DataType:
        """What numbers of a graph's ``dtype`` are here: float32 is what the target computes in."""
        return DTYPES[self.target.real if dtype == torch.float32 else dtype]

    def named_shape(self, type: TensorType) -> ir.Shape:
        """The shape of ``type``, with the names that its symbolic dims have in the file."""
        return ir.Shape([dim if isinstance(dim, int) else self.axes.get(dim, _axis_text(dim)) for dim in type.shape])

    # --- constants and weights -----------------------------------------------------------------------------------

    def constant(self, tensor: Tensor, *, exact: bool = False) -> ir.Value:
        """A small tensor in the model file itself; equal ones are one. Of float32 it becomes what the target computes
        in, unless ``exact``."""
        if tensor.dtype == torch.float32 and not exact:
            limits = torch.finfo(self.target.real)
            tensor = tensor.clamp(limits.min, limits.max).to(self.target.real)
        array = tensor.detach().contiguous().numpy()
        key = (tensor.dtype, tuple(tensor.shape), array.tobytes())
        if key not in self.constants:
            name = self.fresh("constant")
            made = ir.tensor(array, name=name)
            self.constants[key] = ir.Value(
                name=name, const_value=made, type=ir.TensorType(made.dtype), shape=ir.Shape(tensor.shape)
            )
        return self.constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A list of int64, as shapes and axes are."""
        return self.constant(torch.tensor(values, dtype=torch.int64))

    def scalar(self, value: float, dtype: torch.dtype = torch.float32) -> ir.Value:
        return self.constant(torch.tensor(value, dtype=dtype))

    def weight(self, param: Param) -> ir.Value:
        """A parameter in its compute dtype, as a dense tensor of its own shape."""
        return self.store(param.name, self.dense(param))

    def dense(self, param: Param) -> Expr:
        """What ``dense`` gives; the user is told of codes that are lost by it."""
        if is_quantised(param.expr):
            self.note(DENSE)
        return dense(param)

    def store(
        self, name: str, expr: Expr, dtype: ir.DataType | None = None, shape: Sequence[int] | None = None
    ) -> ir.Value:
        """A tensor in a file, made from ``expr`` when it is written; its bytes may be read as another type. One of
        float32 becomes what the target computes in, unless a type is given."""
        if dtype is None and expr.dtype == torch.float32:
            expr = cast(expr, self.target.real)
        kind, sizes = dtype or DTYPES[expr.dtype], tuple(expr.shape if shape is None else shape)
        key = (expr.key, kind, sizes)
        if key not in self.stored:
            label = self.fresh(name)
            value = ir.Value(name=label, type=ir.TensorType(kind), shape=ir.Shape(sizes))
            self.stored[key] = Stored(label, expr, kind, sizes, value)
        return self.stored[key].value

    def note(self, text: str) -> None:
        """Tell the user ``text``, with how often it applies."""
        self.notes[text] = self.notes.get(text, 0) + 1

    # --- sizes ---------------------------------------------------------------------------------------------------

    def dim(self, dim: Dim) -> ir.Value:
        """A dim as an int64 [1]."""
        if isinstance(dim, int):
            return self.ints(dim)
        if dim not in self.sizes:
            self.sizes[dim] = self._named(dim) if dim.isidentifier() else self.computed(dim)
        return self.sizes[dim]

    def shape(self, dims: Iterable[Dim]) -> ir.Value:
        """Dims as one int64 list."""
        dims = list(dims)
        if all(isinstance(dim, int) for dim in dims):
            return self.ints(*(int(dim) for dim in dims))
        return self.op("Concat", *(self.dim(dim) for dim in dims), axis=0)

    def _named(self, name: str) -> ir.Value:
        given = [(value, axis, dim) for value in self.graph.inputs.values() for axis, dim in enumerate(value.shape)]
        found = [
            (named[1], self.values[value], axis)
            for value, axis, dim in given
            if value in self.values and (named := named_multiple(dim)) is not None and named[0] == name
        ]
        if not found:
            raise TargetError(f"no input has the size {name}", where=self.scope)
        times, value, axis = min(found, key=lambda each: each[0])
        size = self.op("Shape", value, start=axis, end=axis + 1)
        return size if times == 1 else self.op("Div", size, self.ints(times))

    def computed(self, dim: Dim, names: Mapping[str, ir.Value] | None = None) -> ir.Value:
        """A dim computed of its ``names``, which may stand for a value a sample."""
        top, bottom = self._fraction(ast.parse(str(dim), mode="eval").body, names or {})
        return top if bottom == 1 else self.op("Div", top, self.ints(bottom))

    def _fraction(self, node: ast.expr, names: Mapping[str, ir.Value]) -> tuple[ir.Value, int]:
        """A dim as a value and what it is to be divided by: sympy writes floor division as ``floor(T/2)``."""
        match node:
            case ast.Constant(value=int(value)):
                return self.ints(value), 1
            case ast.Name(id=name):
                return names[name] if name in names else self.dim(name), 1
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                top, bottom = self._fraction(operand, names)
                return self.op("Neg", top), bottom
            case ast.BinOp(left=left, op=op, right=right):
                return self._arithmetic(op, self._fraction(left, names), self._fraction(right, names))
            case ast.Call(func=ast.Name(id="floor"), args=[inner]):
                top, bottom = self._fraction(inner, names)
                return self.op("Div", top, self.ints(bottom)), 1
            case ast.Call(func=ast.Name(id="Max" | "Min" as name), args=args):
                return self.op(name, *(self.computed(ast.unparse(arg), names) for arg in args)), 1
            case _:
                raise TargetError(f"the size {ast.unparse(node)} has no ONNX form", where=self.scope)

    def _arithmetic(
        self, op: ast.operator, left: tuple[ir.Value, int], right: tuple[ir.Value, int]
    ) -> tuple[ir.Value, int]:
        (a, b), (c, d) = left, right
        match op:
            case ast.Add() | ast.Sub():
                name = "Add" if isinstance(op, ast.Add) else "Sub"
                return self.op(name, self._times(a, d), self._times(c, b)), b * d
            case ast.Mult():
                return self.op("Mul", a, c), b * d
            case ast.Div() if c.const_value is not None:
                return self._times(a, d), b * int(c.const_value.numpy().item())
            case _:
                raise TargetError(f"a size that uses {type(op).__name__} has no ONNX form", where=self.scope)

    def _times(self, value: ir.Value, factor: int) -> ir.Value:
        return value if factor == 1 else self.op("Mul", value, self.ints(factor))


def _axis_text(dim: str) -> str:
    return dim.replace("*", "_x_").replace("-", "_minus_").replace("+", "_plus_").replace("/", "_over_")


def dense(param: Param) -> Expr:
    """The tensor that a graph computes with for ``param``: what a checkpoint of it would hold, in the compute dtype."""
    if not param.persistent or not param.storage.is_floating_point:
        return cast(param.expr, param.type.dtype)
    return cast(
        exactly(param.expr) if param.expr.op == "dequantize" else cast(param.expr, param.storage), param.type.dtype
    )


def exactly(expr: Expr) -> Expr:
    """A quantised weight whose products of code and scale are not rounded: as kernels compute it."""
    codes, scale, *zero = expr.args
    return apply("dequantize", [codes, cast(scale, torch.float32), *zero], dict(expr.attrs))
