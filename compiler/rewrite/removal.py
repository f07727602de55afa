"""Make a graph smaller: remove indices of coupling groups; find the residual stream that layers may leave.

Weights become lazy selections of what they were; types and attributes that hold sizes follow. Nothing is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from compiler.errors import PassError
from compiler.ir.coupling import Axis, CouplingGroup, static_size
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.types import TensorType
from compiler.weights.ops.basic import index

Kept = Mapping[CouplingGroup, Sequence[int]]


def remove(graph: Graph, kept: Kept, *, numbered: bool = False) -> None:
    """Leave of every group in ``kept`` only the indices given, in this order.

    ``numbered`` says that the caller has seen to whatever addresses the indices by number (experts, which are numbered
    by what chooses among them). Raises PassError for a group that is frozen or normed, and for one that is chosen
    from otherwise.
    """
    for group, indices in kept.items():
        reason = group.frozen or group.normed or ("" if numbered else group.chosen)
        if reason:
            raise PassError(f"{group.members[0].param.name} cannot be pruned: {reason}", remedy="name it in `skip`")
        if not indices:
            raise PassError(
                f"nothing would remain of {group.members[0].param.name}", remedy="keep more, or name it in `skip`"
            )
    cut = _strides(kept)
    shapes = {axis: _positions(axis, strides) for axis, strides in cut.items()}
    params = [(value, axis) for value, axis in cut if isinstance(value, Param)]
    for param, axis in params:
        param.expr = index(param.expr, axis, shapes[param, axis])
    for (value, axis), positions in shapes.items():
        value.type = value.type.with_shape((*value.shape[:axis], len(positions), *value.shape[axis + 1 :]))
    _refit(graph, {value for value, _ in cut})


def shrunk(counts: Mapping[CouplingGroup, int]) -> dict[Value, TensorType]:
    """The types of all values and weights that change when so many indices of each group remain."""
    types: dict[Value, TensorType] = {}
    for group, count in counts.items():
        members = [(member.param, member.axis) for member in group.members]
        for value, axis in [*members, *((value, axis) for value, axis, _ in group.values)]:
            type = types.get(value, value.type)
            dims = type.shape
            left = static_size((value, axis)) if value not in types else int(dims[axis])
            types[value] = type.with_shape((*dims[:axis], left * count // group.size, *dims[axis + 1 :]))
    return types


def _strides(kept: Kept) -> dict[Axis, list[tuple[int, int, Sequence[int]]]]:
    """For every axis that loses positions (stride, size, indices kept) of each group that reaches it."""
    cut: dict[Axis, list[tuple[int, int, Sequence[int]]]] = {}
    for group, indices in kept.items():
        places = [*((member.param, member.axis, member.stride) for member in group.members), *group.values]
        for value, axis, stride in places:
            cut.setdefault((value, axis), []).append((stride, group.size, indices))
    return cut


def _positions(axis: Axis, strides: Sequence[tuple[int, int, Sequence[int]]]) -> list[int]:
    """The positions of ``axis`` that remain: it is a product of factors, some of which lose indices."""
    positions, below = [0], 1
    for stride, size, indices in sorted(strides, key=lambda part: part[0]):
        between = [below * i for i in range(stride // below)]
        positions = [i + p for i in between for p in positions]
        positions = [stride * i + p for i in indices for p in positions]
        below = stride * size
    return [below * i + p for i in range(math.ceil(static_size(axis) / below)) for p in positions]


def _refit(graph: Graph, changed: set[Value]) -> None:
    """Let attributes follow the types that have changed, and check that operations agree with these."""
    for node in graph.nodes:
        if not changed.isdisjoint((*node.inputs, *node.outputs)):
            operands, results = [value and value.type for value in node.inputs], [value.type for value in node.outputs]
            node.attrs = node.op.fitted(operands, results, node.attrs)
            if node.op.infer_types(operands, node.attrs, node.scope) != results:
                raise PassError(
                    f"`{node.op.name}` in `{node.scope}` does not follow when its axes become smaller",
                    remedy="name the weights before it in `skip`",
                )


def reorder(outer: CouplingGroup, inner: CouplingGroup, order: Sequence[Sequence[int]]) -> None:
    """Give the indices of ``inner`` another order within each index of ``outer``, which lies right above it.

    ``order[i]`` are the indices of ``inner`` at index i of ``outer``. Where every weight with an axis in ``inner`` has
    it below ``outer``, the model computes what it did.
    """
    above = {(member.param, member.axis): member.stride for member in outer.members}
    for member in inner.members:
        if above.get((member.param, member.axis)) != member.stride * inner.size:
            raise PassError(
                f"{member.param.name} cannot be reordered: its heads are not grouped like the others'",
                remedy="name it in `skip`",
            )
        flat = [i * inner.size + j for i, row in enumerate(order) for j in row]
        period = member.stride * inner.size * outer.size
        size = static_size((member.param, member.axis))
        places = [
            start + member.stride * j + p
            for start in range(0, size, period)
            for j in flat
            for p in range(member.stride)
        ]
        member.param.expr = index(member.param.expr, member.axis, places)


def stream_of(step: Node) -> Value:
    """The operand of ``step`` that came first: the other is computed from it."""
    first, second = step.input(0), step.input(1)
    return second if _depends(first, second) else first


def _depends(value: Value, on: Value) -> bool:
    from compiler.ir.graph import ancestors

    return on.node is None or on.node in ancestors([value])
