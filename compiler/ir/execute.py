"""Running a graph with torch: node by node with lazily read weights, or lowered to a ``torch.fx.GraphModule``.

Both call the operations' reference ``eval``; nothing here knows what an operation computes. Symbolic dims are
resolved from the shapes of the inputs at run time.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from compiler.errors import OpError
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.types import Dim, named_multiple
from compiler.weights.evaluate import evaluate


def run(
    graph: Graph,
    inputs: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    observe: Callable[[Value, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """The outputs of ``graph`` for ``inputs`` (by name, shapes as ``graph.inputs`` declares them).

    Weights are evaluated when the node that needs them runs and dropped after it; activations are dropped after
    their last use. ``observe`` sees every computed value. Raises OpError when an input is missing, unknown or of
    the wrong shape.
    """
    bindings = bind_dims(graph, inputs)
    values = {value: inputs[name].to(device) for name, value in graph.inputs.items()}
    with torch.no_grad():
        run_nodes(
            graph, list(graph.nodes), values, bindings, keep=graph.outputs.values(), device=device, observe=observe
        )
        return {name: _fetch(graph, value, values, device) for name, value in graph.outputs.items()}


def run_nodes(
    graph: Graph,
    nodes: Sequence[Node],
    values: dict[Value, Tensor],
    bindings: Mapping[str, int],
    *,
    keep: Iterable[Value] = (),
    device: torch.device | str = "cpu",
    observe: Callable[[Value, Tensor], None] | None = None,
) -> None:
    """Run ``nodes`` in order, adding their results to ``values`` and dropping from it what no later node reads.

    ``values`` holds what the nodes read from outside; values in ``keep`` survive. A parameter that is in ``values`` is
    not read again. This runs one layer at a time as well as a whole graph.
    """
    kept = set(keep)
    last_use = {value: node for node in nodes for value in node.inputs if value is not None}
    for node in nodes:
        operands = [None if v is None else _fetch(graph, v, values, device) for v in node.inputs]
        for value, result in zip(node.outputs, _call(node, operands, bindings, device), strict=True):
            if observe is not None:
                observe(value, result)
            if value in last_use or value in kept:
                values[value] = result
        for value in node.inputs:
            if value is not None and value not in kept and last_use[value] is node:
                values.pop(value, None)


def read_param(graph: Graph, param: Param, device: torch.device | str = "cpu") -> Tensor:
    """The value of a parameter in its compute dtype, rounded as a checkpoint of it would be."""
    (tensor,) = evaluate([param.expr], graph.sources)
    if param.persistent and not param.expr.op.startswith("dequantize"):
        tensor = tensor.to(param.storage)
    return tensor.to(device=device, dtype=param.type.dtype)


def _fetch(graph: Graph, value: Value, values: Mapping[Value, Tensor], device: torch.device | str) -> Tensor:
    if isinstance(value, Param) and value not in values:
        return read_param(graph, value, device)
    return values[value]


def _call(
    node: Node, operands: list[Tensor | None], bindings: Mapping[str, int], device: torch.device | str
) -> Sequence[Tensor]:
    attrs = _resolved_attrs(node, lambda dim: evaluate_dim(dim, bindings))
    with torch.device(device):
        result = node.op.eval(*_padded(node, operands), **attrs)
    return [result] if isinstance(result, Tensor) else result


def _padded(node: Node, operands: list[Any]) -> list[Any]:
    """The operands with None for absent trailing optional ones, as ``eval`` expects them."""
    return operands + [None] * (len(node.op.operands.split()) - len(operands))


def _resolved_attrs(node: Node, resolve: Callable[[Dim], Any]) -> dict[str, Any]:
    attrs = node.op.all_attrs(node.attrs)
    for name, spec in node.op.attrs.items():
        if spec.kind == "dim" and attrs[name] is not None:
            attrs[name] = resolve(attrs[name])
        elif spec.kind == "dims" and attrs[name] is not None:
            attrs[name] = tuple(resolve(dim) for dim in attrs[name])
    return attrs


def bind_dims(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """The size of every symbolic dim, from the shapes of ``inputs``. Raises OpError when they do not fit."""
    if inputs.keys() != graph.inputs.keys():
        raise OpError(f"graph `{graph.name}` takes inputs {', '.join(graph.inputs)}; got {', '.join(inputs)}")
    bindings: dict[str, int] = {}
    given = [
        pair for name, value in graph.inputs.items() for pair in zip(value.shape, inputs[name].shape, strict=False)
    ]
    found = [(named, size) for dim, size in given if (named := named_multiple(dim)) is not None]
    for (name, times), size in sorted(found, key=lambda each: each[0][1]):  # what is given once says most
        bindings.setdefault(name, size // times)
    for name, value in graph.inputs.items():
        shape = tuple(inputs[name].shape)
        if len(shape) != value.type.rank or shape != tuple(evaluate_dim(dim, bindings) for dim in value.shape):
            raise OpError(f"input `{name}` must be {value.type}, got shape {list(shape)}")
    return bindings


def evaluate_dim(dim: Dim, bindings: Mapping[str, Any]) -> Any:
    """The value of a dim under ``bindings``, whose values may be ints, SymInts or fx proxies."""
    if isinstance(dim, int):
        return dim
    if dim in bindings:
        return bindings[dim]
    return _whole(_rational(_parsed(dim), bindings))


def _whole(fraction: tuple[Any, int]) -> Any:
    numerator, denominator = fraction
    return numerator if denominator == 1 else numerator // denominator


@lru_cache(maxsize=4096)
def _parsed(dim: str) -> ast.expr:
    return ast.parse(dim, mode="eval").body


def _rational(node: ast.expr, bindings: Mapping[str, Any]) -> tuple[Any, int]:
    """A dim expression as an exact fraction: sympy writes floor division as ``floor(T/2)``."""
    match node:
        case ast.Constant(value=int(value)):
            return value, 1
        case ast.Name(id=name) if name in bindings:
            return bindings[name], 1
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            top, bottom = _rational(operand, bindings)
            return -top, bottom
        case ast.BinOp(left=left, op=op, right=right):
            return _combine(op, _rational(left, bindings), _rational(right, bindings))
        case ast.Call(func=ast.Name(id=name), args=args):
            return _function(name, [_rational(arg, bindings) for arg in args]), 1
        case _:
            raise OpError(f"the dim `{ast.unparse(node)}` is not determined by {', '.join(bindings)}")


def _combine(op: ast.operator, left: tuple[Any, int], right: tuple[Any, int]) -> tuple[Any, int]:
    (a, b), (c, d) = left, right
    match op:
        case ast.Add():
            return _cross(a, d) + _cross(c, b), b * d
        case ast.Sub():
            return _cross(a, d) - _cross(c, b), b * d
        case ast.Mult():
            return a * c, b * d
        case ast.Div():
            return _cross(a, d), b * c
        case ast.Pow():
            return a**c, b**c
        case _:
            raise OpError(f"a dim cannot use {type(op).__name__}")


def _cross(value: Any, factor: int) -> Any:
    return value if factor == 1 else value * factor


def _function(name: str, args: list[tuple[Any, int]]) -> Any:
    top, bottom = args[0]
    match name:
        case "floor":
            return top // bottom
        case "ceiling":
            return -(-top // bottom)
        case "Mod":
            return operator.mod(*map(_whole, args))
        case "Max":
            return reduce(torch.sym_max, map(_whole, args))
        case "Min":
            return reduce(torch.sym_min, map(_whole, args))
        case _:
            raise OpError(f"a dim cannot use {name}()")


def to_torch(graph: Graph, *, device: torch.device | str = "cpu") -> fx.GraphModule:
    """Lower ``graph`` to a module that takes the inputs by name and returns the outputs as a dict.

    Floating weights are parameters and other tensors are buffers, under the parameters' own names and in their
    compute dtype. The module computes on the device of its inputs, which must be its own. It runs as it is and can be
    given to ``torch.compile`` and ``torch.export``.
    """
    root, lowered = nn.Module(), fx.Graph()
    placeholders = {value: fx.Proxy(lowered.placeholder(name)) for name, value in graph.inputs.items()}
    sizes = _input_sizes(graph, placeholders)
    place = lowered.call_function(getattr, (next(iter(placeholders.values())).node, "device"))
    results: dict[Value, Any] = {value: proxy.node for value, proxy in placeholders.items()}
    for param in graph.params.values():
        _register(root, param, read_param(graph, param, device))
        results[param] = lowered.get_attr(param.name)
    for node in graph.nodes:
        operands = [None if v is None else results[v] for v in node.inputs]
        attrs = _resolved_attrs(node, lambda dim: _fx_dim(dim, sizes))
        call = lowered.call_function(node.op.eval, tuple(_padded(node, operands)), attrs)
        if not node.inputs:
            call = lowered.call_method("to", (call, place))
        results.update(_unpacked(lowered, node, call))
    lowered.output({name: results[value] for name, value in graph.outputs.items()})
    module = fx.GraphModule(root, lowered, graph.name)
    for param in graph.params.values():
        if not param.persistent:
            _forget(module, param.name)
    return module


def _unpacked(lowered: fx.Graph, node: Node, call: fx.Node) -> dict[Value, fx.Node]:
    if len(node.outputs) == 1:
        return {node.output: call}
    return {value: lowered.call_function(operator.getitem, (call, index)) for index, value in enumerate(node.outputs)}


def _input_sizes(graph: Graph, placeholders: Mapping[Value, fx.Proxy]) -> dict[str, fx.Proxy]:
    sizes: dict[str, fx.Proxy] = {}
    for value, proxy in placeholders.items():
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, str) and dim not in sizes:
                sizes[dim] = proxy.size(axis)
    for dim, size in list(sizes.items()):
        name, times = named_multiple(dim) or (dim, 1)
        if name not in sizes:
            sizes[name] = operator.floordiv(size, times)
    return sizes


def _fx_dim(dim: Dim, sizes: Mapping[str, fx.Proxy]) -> Any:
    value = evaluate_dim(dim, sizes)
    return value.node if isinstance(value, fx.Proxy) else value


def _register(root: nn.Module, param: Param, tensor: Tensor) -> None:
    *path, leaf = param.name.split(".")
    module = root
    for part in path:
        if part not in dict(module.named_children()):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if tensor.is_floating_point() and param.persistent:
        module.register_parameter(leaf, nn.Parameter(tensor))
    else:
        module.register_buffer(leaf, tensor)


def _forget(root: nn.Module, name: str) -> None:
    """Keep a buffer out of the state dict: a GraphModule copies buffers, but not that they are not persistent."""
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    module.register_buffer(leaf, root.get_buffer(name), persistent=False)
