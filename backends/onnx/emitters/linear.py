"""Linear maps, tables and convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder
from backends.onnx.emitters.rule import Rule, rule
from backends.onnx.int8 import multiplied_in_int8
from backends.onnx.masks import END
from backends.onnx.quantised import gathered, joined, multiplied, packed
from compiler.ir.graph import Node, Param, Value
from compiler.ir.ops.hadamard import basis, cosines
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import cast, concat


@rule("linear")
def linear(build: Builder, node: Node) -> ir.Value:
    x, beside = build.arg(node, 0), build.fusions.beside.get(node)
    if beside is not None:
        return _several(build, x, beside)
    if node is build.head:
        return linear_map(build, _scored(build, x), node.input(1), node.optional_input(2), many=False)
    return linear_map(build, x, node.input(1), node.optional_input(2))


def _several(build: Builder, x: ir.Value, nodes: Sequence[Node]) -> ir.Value:
    """What ``nodes`` make of ``x``, in one product; that of the first."""
    product = linear_map(build, x, stacked(build, [node.input(1) for node in nodes]), None)
    sizes = build.ints(*(int(node.input(1).shape[0]) for node in nodes))
    parts = build.ops("Split", product, sizes, count=len(nodes), axis=-1)
    for node, part in zip(nodes[1:], parts[1:], strict=True):
        build.bind(node.output, part)
    return parts[0]


def stacked(build: Builder, values: Sequence[Value]) -> Param:
    """Parameters on top of one another, as one."""
    params = [value for value in values if isinstance(value, Param)]
    expr: Expr = joined(params) or concat([build.dense(param) for param in params], 0)
    name = ".and.".join([params[0].name, *(param.name.rpartition(".")[0].rpartition(".")[2] for param in params[1:])])
    return Param(name, expr.type.with_dtype(params[0].type.dtype), expr=expr, storage=expr.dtype)


def _scored(build: Builder, x: ir.Value) -> ir.Value:
    """The tokens of ``x`` [B, T, n] whose logits are wanted."""
    if build.last is not None:
        return build.op("GatherND", x, build.last, batch_dims=1)
    if build.kept is None:
        return x
    return build.op("Slice", x, build.op("Neg", build.kept), build.ints(END), build.ints(1))


def linear_map(build: Builder, x: ir.Value, weight: Value, bias: Value | None, *, many: bool = True) -> ir.Value:
    """x @ weight.T + bias. Weights stay [out, in], so that they are written row by row and can be shared. ``many``
    is false where few tokens are multiplied even in a model for many."""
    added = None if bias is None else build.value(bias)
    if build.many and many and isinstance(weight, Param) and weight.expr.op == "dequantize":
        return multiplied_in_int8(build, x, weight, added)
    form = packed(build, weight) if isinstance(weight, Param) else None
    if form is not None:
        return multiplied(build, x, form, added)
    matrix = build.value(weight)
    if build.target.contrib:
        product = build.contrib("FusedMatMul", x, matrix, transB=1)
    else:
        product = build.op("MatMul", x, build.op("Transpose", matrix, perm=(1, 0)))
    return product if added is None else build.op("Add", product, added)


@rule("embedding")
def embedding(build: Builder, node: Node) -> ir.Value:
    table, ids = node.input(0), build.arg(node, 1)
    form = packed(build, table, table=True) if isinstance(table, Param) else None
    if form is not None:
        return gathered(build, form, ids)
    if isinstance(table, Param) and _narrow(table):
        rows = build.op("Gather", build.store(table.name, cast(table.expr, table.storage)), ids, axis=0)
        return build.op("Cast", rows, to=build.kind(torch.float32))
    return build.op("Gather", build.value(table), ids, axis=0)


def _narrow(table: Param) -> bool:
    """Whether a table is stored in half precision and only looked up: its rows are widened when they are read."""
    half = table.storage in (torch.float16, torch.bfloat16) and table.expr.op != "dequantize"
    return half and all(user.op.name == "embedding" for user in table.users)


@rule("conv", "stride", "padding", "dilation", "groups")
def conv(build: Builder, node: Node) -> ir.Value:
    pads = (*node.attr("padding"), *node.attr("padding"))
    return build.op(
        "Conv",
        build.arg(node, 0),
        build.arg(node, 1),
        build.optional(node, 2),
        strides=node.attr("stride"),
        pads=pads,
        dilations=node.attr("dilation"),
        group=node.attr("groups"),
    )


@rule("hadamard")
def rotated(build: Builder, node: Node) -> ir.Value:
    """Products with the two small matrices whose Kronecker product the transform is."""
    x = node.input(0)
    width, lead = int(x.shape[-1]), [0] * (x.type.rank - 1)
    power = width & -width
    made = build.op("Reshape", build.arg(node, 0), build.ints(*lead, -1, power))
    made = build.op("MatMul", made, build.constant(basis(power).float()))
    if power < width:
        made = build.op("MatMul", build.constant(cosines(width // power).T.float()), made)
    return build.op("Reshape", made, build.ints(*lead, width))


RULES: tuple[Rule, ...] = (linear, embedding, conv, rotated)
