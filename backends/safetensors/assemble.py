"""From the parameters of a captured graph back to the tensors of the module it was captured from.

Capture takes fused weights apart and turns transposed ones around: a parameter of the target's graph is an
expression over one tensor of its module. Undoing that, part by part, gives the tensor from the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from backends.safetensors.unify import Mismatch
from compiler.ir.graph import Graph
from compiler.weights.expr import Expr, loads
from compiler.weights.ops.basic import concat, index, reshape, transpose

Part = tuple[tuple[Expr, ...], Expr]


def assemble(target: Graph, parts: Mapping[str, Expr]) -> dict[str, Expr] | Mismatch:
    """The tensors of ``target``'s module by name, from an expression for every stored parameter of its graph.

    Raises nothing: what cannot be undone is a Mismatch naming the tensor.
    """
    wholes: dict[Expr, list[Part]] = {}
    for name, expr in parts.items():
        steps = _steps(target.params[name].expr)
        if not steps or steps[0].op != "load":
            return Mismatch(f"{name} is made in a way that cannot be undone")
        wholes.setdefault(steps[0], []).append((steps[1:], expr))
    found: dict[str, Expr] = {}
    for whole, made in wholes.items():
        expr = _undo(whole.shape, made)
        if expr is None:
            return Mismatch(f"{whole.attr('key')} is used in parts that do not make it up")
        found[whole.attr("key")] = expr
    return found


def _steps(expr: Expr) -> tuple[Expr, ...]:
    """The chain of operations from a stored tensor to ``expr``, the ``load`` first; () when it is no chain."""
    chain: list[Expr] = [expr]
    while len(chain[-1].args) == 1:
        chain.append(chain[-1].args[0])
    return tuple(reversed(chain)) if len(loads([expr])) == 1 and chain[-1].op == "load" else ()


def _undo(shape: Sequence[int], parts: Sequence[Part]) -> Expr | None:
    """A tensor of ``shape`` from what several chains of operations make of it."""
    if len(parts) == 1 and not parts[0][0]:
        return parts[0][1]
    firsts = [steps[0] for steps, _ in parts if steps]
    rest: list[Part] = [(steps[1:], expr) for steps, expr in parts if steps]
    if len(firsts) < len(parts):
        return None
    if firsts[0].op == "slice":
        return _joined(shape, firsts, rest)
    if len(set(firsts)) > 1:
        return None
    return _inverted(firsts[0], shape, _undo(firsts[0].shape, rest))


def _inverted(step: Expr, shape: Sequence[int], result: Expr | None) -> Expr | None:
    if result is None:
        return None
    match step.op:
        case "reshape":
            return reshape(result, shape)
        case "transpose":
            perm: tuple[int, ...] = step.attr("perm")
            return transpose(result, [perm.index(axis) for axis in range(len(perm))])
        case "index" if sorted(step.attr("indices")) == list(range(shape[step.attr("axis")])):
            places: tuple[int, ...] = step.attr("indices")
            return index(result, step.attr("axis"), [places.index(i) for i in range(len(places))])
        case _:
            return None


def _joined(shape: Sequence[int], slices: Sequence[Expr], rest: Sequence[Part]) -> Expr | None:
    """Slices of one axis that cover it without overlap, side by side."""
    axis = slices[0].attr("axis")
    ranges: dict[tuple[int, int], list[int]] = {}
    for i, step in enumerate(slices):
        if step.op != "slice" or step.attr("axis") != axis:
            return None
        ranges.setdefault((step.attr("start"), step.attr("stop")), []).append(i)
    ends = [0, *(stop for _, stop in sorted(ranges))]
    if [start for start, _ in sorted(ranges)] != ends[:-1] or ends[-1] != shape[axis]:
        return None
    pieces = [_undo(slices[members[0]].shape, [rest[i] for i in members]) for _, members in sorted(ranges.items())]
    whole = [piece for piece in pieces if piece is not None]
    return concat(whole, axis) if len(whole) == len(pieces) else None
