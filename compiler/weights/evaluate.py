"""Evaluate weight expressions: each distinct sub-expression once, each value freed at its last use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from compiler.errors import CheckpointError
from compiler.weights.expr import Expr
from compiler.weights.ops import weight_op
from compiler.weights.source import Source

_CHANGED = "the files have changed since they were opened: fetch them again, and repeat the run"


def evaluate(exprs: Sequence[Expr], sources: Mapping[str, Source]) -> list[Tensor]:
    """The values of ``exprs``, in order.

    A slice of a stored tensor's first axis reads only those rows. Results may share memory with one another.
    Raises CheckpointError when a source lacks a tensor, or has it in another type than the expression says.
    """
    order = _schedule(exprs)
    uses = _use_counts(exprs, order)
    values: dict[str, Tensor] = {}
    for expr in order:
        values[expr.key] = _compute(expr, values, sources)
        for arg in _operands(expr):
            uses[arg.key] -= 1
            if not uses[arg.key]:
                del values[arg.key]
    return [values[expr.key] for expr in exprs]


def working_set(exprs: Sequence[Expr]) -> int:
    """The most bytes that ``evaluate(exprs)`` holds at once, results included; every value counted as a copy."""
    order = _schedule(exprs)
    uses = _use_counts(exprs, order)
    held = peak = 0
    for expr in order:
        held += expr.type.nbytes
        peak = max(peak, held)
        for arg in _operands(expr):
            uses[arg.key] -= 1
            held -= 0 if uses[arg.key] else arg.type.nbytes
    return peak


def work(exprs: Sequence[Expr]) -> int:
    """Bytes of all values that ``evaluate(exprs)`` makes: a measure of its cost."""
    return sum(expr.type.nbytes for expr in _schedule(exprs))


def reads(exprs: Sequence[Expr]) -> list[Expr]:
    """The distinct reads (whole tensors, or ranges of rows) that ``evaluate(exprs)`` makes, in order."""
    return [expr for expr in _schedule(exprs) if expr.op == "load" or is_row_read(expr)]


def is_row_read(expr: Expr) -> bool:
    """Whether ``expr`` is a range of a stored tensor's first axis, which is read without the rest."""
    return expr.op == "slice" and expr.args[0].op == "load" and expr.attr("axis") == 0


def _operands(expr: Expr) -> tuple[Expr, ...]:
    return () if is_row_read(expr) else expr.args


def _use_counts(exprs: Sequence[Expr], order: Sequence[Expr]) -> Counter[str]:
    """How often each value is read; the results themselves count once more, so that they are kept."""
    uses = Counter(arg.key for expr in order for arg in _operands(expr))
    uses.update(expr.key for expr in exprs)
    return uses


def _schedule(exprs: Sequence[Expr]) -> list[Expr]:
    """Every distinct sub-expression, operands first (depth first, so that few values are alive at once)."""
    order: dict[str, Expr] = {}
    entered: set[str] = set()
    for root in exprs:
        stack: list[tuple[Expr, Iterator[Expr]]] = []
        _enter(root, stack, entered)
        while stack:
            expr, rest = stack[-1]
            arg = next(rest, None)
            if arg is None:
                order[expr.key] = expr
                stack.pop()
            else:
                _enter(arg, stack, entered)
    return list(order.values())


def _enter(expr: Expr, stack: list[tuple[Expr, Iterator[Expr]]], entered: set[str]) -> None:
    if expr.key not in entered:
        entered.add(expr.key)
        stack.append((expr, iter(_operands(expr))))


def _compute(expr: Expr, values: Mapping[str, Tensor], sources: Mapping[str, Source]) -> Tensor:
    if expr.op == "load":
        return _source(expr, sources).read(expr.attr("key"))
    if is_row_read(expr):
        load = expr.args[0]
        return _source(load, sources).read_rows(load.attr("key"), expr.attr("start"), expr.attr("stop"))
    return weight_op(expr.op).compute([values[arg.key] for arg in expr.args], dict(expr.attrs))


def _source(load: Expr, sources: Mapping[str, Source]) -> Source:
    """The source that ``load`` names, once it is known to hold that tensor in that type."""
    name, key = load.attr("source"), load.attr("key")
    if name not in sources:
        raise CheckpointError(f"no weights are bound for `{name}`", remedy="give a checkpoint, not a config alone")
    found = sources[name].types.get(key)
    if found is None:
        raise CheckpointError(f"tensor {key} is missing", where=name, remedy=_CHANGED)
    if found != load.type:
        raise CheckpointError(f"tensor {key} is {found}, not {load.type}", where=name, remedy=_CHANGED)
    return sources[name]
