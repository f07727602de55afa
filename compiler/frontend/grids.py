"""Towers that read pictures as patches in a row, of a grid that is known while they are traced.

What such a tower computes of its grids, before it looks at a pixel, transformers lets anyone compute beforehand: where
patches stand, which of them attend to each other, how learnt places are stretched. One picture is traced, and then
the graph is given an axis for others of the same grid.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compiler.errors import CaptureError
from compiler.ir.execute import run_nodes
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.ops.elementwise import OPS as ELEMENTWISE
from compiler.ir.types import Dim, TensorType, dim_product
from compiler.weights.ops.basic import literal

GRID = "grid_thw"
WHOLE = ("image_grid_thw", "video_grid_thw")
BATCH = "B"
_ALIGNED = frozenset(op.name for op in ELEMENTWISE)
_TOWERS = "towers of the layout of Qwen2-VL, Qwen2.5-VL and Qwen3-VL are understood"


@dataclass(frozen=True)
class Grid:
    """``patches`` are those of one picture, ``known`` what the tower is given instead of a grid."""

    patches: int
    known: Mapping[str, Any]


def grid_of(module: nn.Module, inputs: Mapping[str, Tensor]) -> Grid | None:
    """The one grid of the example pictures, whose values matter; None where inputs name none.

    Raises CaptureError for several grids, patches that do not fill them, a tower that does not take what is computed
    of them beforehand, and models of texts that place pictures by such grids.
    """
    if any(name in inputs for name in WHOLE):
        name = type(module).__name__
        cause = f"`{name}` places each picture by what is in the text, which torch cannot trace"
        remedy = (
            "capture its tower alone, as `capture(model.model.visual, inputs={hidden_states, grid_thw})`, or the text"
        )
        raise CaptureError(cause, remedy=remedy)
    if GRID not in inputs:
        return None
    grids, others = inputs[GRID], [tensor for name, tensor in inputs.items() if name != GRID]
    if grids.is_meta or grids.dim() != 2 or not len(grids) or grids.shape[1] != 3 or bool((grids != grids[:1]).any()):
        remedy = "give [pictures, 3] whole numbers, time, height and width in patches, the same for each picture"
        raise CaptureError("pictures must be of one grid, whose values are known", where=GRID, remedy=remedy)
    patches = int(grids[0].prod())
    if any(tensor.dim() == 0 or len(tensor) != patches * len(grids) for tensor in others):
        remedy = f"give every other input {patches * len(grids)} rows, or another grid"
        raise CaptureError(f"{len(grids)} pictures have {patches} patches each", where=GRID, remedy=remedy)
    return Grid(patches, _known(module, grids[:1].cpu()))


def _known(module: Any, grid: Tensor) -> dict[str, Any]:
    """What the tower computes of one ``grid`` [1, 3]. Bounds of what attends to each other are no tensors, so that they
    are known while tracing."""
    from transformers import vision_utils as places

    name = type(module).__name__
    if not hasattr(module, "spatial_merge_size") or _has_its_own_way(module):
        raise CaptureError(f"`{name}` is no tower whose grids are understood", where=GRID, remedy=_TOWERS)
    merge = module.spatial_merge_size
    if grid[0, 1] % merge or grid[0, 2] % merge:
        cause = f"`{name}` joins {merge} x {merge} patches, which the grid is no multiple of"
        raise CaptureError(cause, where=GRID, remedy=f"give a height and a width that {merge} divides")
    known: dict[str, Any] = {
        GRID: grid,
        "position_ids": places.get_vision_position_ids(grid, merge),
        "cu_seqlens": places.get_vision_cu_seqlens(grid).numpy(),
    }
    if hasattr(module, "window_size"):
        index, bounds = places.get_vision_window_index(grid, merge, module.window_size, module.patch_size)
        known |= {"window_index": index, "cu_window_seqlens": bounds.numpy()}
    if hasattr(module, "num_grid_per_side"):
        taps = places.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=module.num_grid_per_side,
            mode=module.interpolation_mode,
            align_corners=module.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        known |= dict(zip(("interp_indices", "interp_weights"), taps, strict=True))
    return known


def _has_its_own_way(module: Any) -> bool:
    """Whether a tower says in constants what it computes of its grids: other places or bounds than `_known` has."""
    source = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward))))
    calls = (node for node in ast.walk(source) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    given = [
        argument
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id.startswith("get_vision_")
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
    ]
    return any(isinstance(argument, ast.Constant) for argument in given)


@contextmanager
def given(module: nn.Module, known: Mapping[str, Any]) -> Generator[None]:
    """Let ``module`` be called with what is ``known``."""
    if not known:
        yield
        return
    module.forward = partial(module.forward, **known)
    try:
        yield
    finally:
        del module.forward


def repeat(graph: Graph, patches: int) -> None:
    """Let ``graph``, of one picture, take any number of them: inputs [B * patches, ...] one after the other, and so
    outputs. Tables of places become constants. Raises CaptureError naming what cannot be done for each.
    """
    _fold(graph)
    many: dict[Value, None] = {}
    for name, value in graph.inputs.items():
        rest = value.shape[1:]
        value.type = value.type.with_shape((dim_product((patches, BATCH)), *rest))
        first = next(iter(graph.nodes))
        apart = graph.op("reshape", [value], {"shape": (BATCH, patches, *rest)}, before=first)
        for node in list(value.users):
            _exchange(graph, node, value, apart)
        many[apart] = None
        graph.inputs[name] = value
    started = {value.node for value in many}
    for node in list(graph.nodes):
        if node not in started and any(value in many for value in node.inputs if value is not None):
            _repeat(graph, node, many)
    for name, value in graph.outputs.items():
        if value in many:
            rows = (dim_product((BATCH, value.shape[1])), *value.shape[2:])
            graph.outputs[name] = graph.op("reshape", [value], {"shape": rows})


def _fold(graph: Graph) -> None:
    """Let what is computed of constants alone be constants, equal ones the same."""
    known: dict[Node, None] = {}
    for node in graph.nodes:
        if all(value.node in known or _is_constant(value) for value in node.inputs if value is not None):
            known[node] = None
    values: dict[Value, Tensor] = {}
    run_nodes(graph, list(known), values, {}, keep=(kept := [value for node in known for value in node.outputs]))
    params: dict[tuple[torch.Size, torch.dtype, bytes], Param] = {}
    for value in kept:
        if any(user not in known for user in value.users):
            tensor = values[value].contiguous()
            key = tensor.shape, tensor.dtype, tensor.numpy().tobytes()
            if key not in params:
                expr = literal(tensor.flatten().tolist(), tensor.shape, tensor.dtype)
                params[key] = graph.add_param(f"constants.grid_{len(params)}", expr, persistent=False)
            graph.replace(value, params[key])
    graph.prune()


def _is_constant(value: Value) -> bool:
    return isinstance(value, Param) and value.expr.op == "literal"


def _exchange(graph: Graph, node: Node, old: Value, new: Value) -> None:
    if node is new.node:
        return
    for place, value in enumerate(node.inputs):
        if value is old:
            graph.set_input(node, place, new)


def _repeat(graph: Graph, node: Node, many: dict[Value, None]) -> None:
    """Let ``node`` be done for each picture, some of whose operands are of ``many``."""
    before = [value.type for value in node.outputs]
    if node.op.name in ("attention", "conv"):
        _joined(graph, node, many)
        return
    if node.op.name in _ALIGNED:
        _align(graph, node, many, max(type.rank for type in before))
    node.attrs = node.op.normalise_attrs({name: _moved(name, value) for name, value in node.attrs.items()})
    _infer(node)
    for value in node.outputs:
        many[value] = None


def _moved(name: str, value: Any) -> Any:
    """An attribute that says axes, with one more before them."""
    match name:
        case "shape":
            return (BATCH, *value)
        case "perm":
            return (0, *(axis + 1 for axis in value))
        case "axis":
            return value + 1 if value >= 0 else value
        case "axes":
            return tuple(axis + 1 if axis >= 0 else axis for axis in value)
        case _:
            return value


def _align(graph: Graph, node: Node, many: Mapping[Value, None], rank: int) -> None:
    """Operands of fewer axes than the result have those of size 1 behind the first."""
    for place, value in enumerate(node.inputs):
        if value is not None and value in many and value.type.rank <= rank:
            shape = (BATCH, *(1,) * (rank + 1 - value.type.rank), *value.shape[1:])
            graph.set_input(node, place, graph.op("reshape", [value], {"shape": shape}, scope=node.scope, before=node))


def _joined(graph: Graph, node: Node, many: dict[Value, None]) -> None:
    """Operations that have samples already, one for what they do of a picture: those of all pictures are in a row."""
    samples = {value.shape[1] for value in node.inputs if value is not None and value in many}
    for place, value in enumerate(node.inputs):
        if value is not None and value in many:
            shape: tuple[Dim, ...] = (dim_product((BATCH, value.shape[1])), *value.shape[2:])
            graph.set_input(node, place, graph.op("reshape", [value], {"shape": shape}, scope=node.scope, before=node))
    _infer(node)
    made, after = node.output, node.following
    (count,) = samples
    readers = list(made.users)
    apart = graph.op("reshape", [made], {"shape": (BATCH, count, *made.shape[1:])}, scope=node.scope, before=after)
    for reader in readers:
        _exchange(graph, reader, made, apart)
    graph.outputs |= {name: apart for name, value in graph.outputs.items() if value is made}
    many[apart] = None


def _infer(node: Node) -> None:
    try:
        types: list[TensorType] = node.op.infer_types([v and v.type for v in node.inputs], node.attrs, node.scope)
    except ValueError as reason:
        cause = f"the operation `{node.op.name}` cannot be done for several pictures: {reason}"
        raise CaptureError(cause, where=node.scope) from reason
    for value, type in zip(node.outputs, types, strict=True):
        value.type = type
