"""Cut the writing of tensors into tasks that each fit a memory budget.

Tensors made from the same reads (the codes and the scales of one weight) are made together, so that nothing is
read or computed twice. What does not fit the budget is made in ranges of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from compiler.weights.evaluate import reads, work, working_set
from compiler.weights.expr import Expr
from compiler.weights.ops import take

_REDUNDANCY = 1.5  # how many times the work of the whole all the pieces together may cost


@dataclass(frozen=True)
class Piece:
    """The rows from ``start`` on of the tensor called ``name``; ``expr`` makes them."""

    name: str
    expr: Expr
    start: int


@dataclass(frozen=True)
class Task:
    """Pieces to evaluate together. ``completes`` names the tensors that are finished once it has run."""

    pieces: tuple[Piece, ...]
    completes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it writes."""
        return sum(piece.expr.type.nbytes for piece in self.pieces)


def plan(tensors: Mapping[str, Expr], budget: int) -> list[Task]:
    """Tasks that make all ``tensors``, in order, with working sets within ``budget`` bytes where that is possible."""
    tasks: list[Task] = []
    for group in _groups(tensors):
        for part in _within(group, budget):
            tasks += _cut(part, budget)
    return tasks


def _groups(tensors: Mapping[str, Expr]) -> list[dict[str, Expr]]:
    """Tensors that share a read, together; groups in the order of their first tensors."""
    group_of_read: dict[str, int] = {}
    groups: list[dict[str, Expr]] = []
    for name, expr in tensors.items():
        keys = [read.key for read in reads([expr])]
        shared = sorted({group_of_read[key] for key in keys if key in group_of_read})
        target = shared[0] if shared else len(groups)
        if not shared:
            groups.append({})
        for other in shared[1:]:
            groups[target] |= groups[other]
            groups[other] = {}
            group_of_read |= {key: target for key, index in group_of_read.items() if index == other}
        groups[target][name] = expr
        group_of_read |= dict.fromkeys(keys, target)
    return [group for group in groups if group]


def _within(group: Mapping[str, Expr], budget: int) -> list[dict[str, Expr]]:
    """The group whole if it fits or its tensors can be cut alike, otherwise split by number of rows."""
    if working_set(list(group.values())) <= budget:
        return [dict(group)]
    by_rows: dict[int, dict[str, Expr]] = {}
    for name, expr in group.items():
        by_rows.setdefault(expr.shape[0] if expr.shape else 0, {})[name] = expr
    return list(by_rows.values())


def _cut(part: Mapping[str, Expr], budget: int) -> list[Task]:
    exprs = list(part.values())
    whole = Task(tuple(Piece(name, expr, 0) for name, expr in part.items()), tuple(part))
    rows = exprs[0].shape[0] if exprs[0].shape else 1
    if working_set(exprs) <= budget or rows < 2:
        return [whole]
    step = _step(exprs, rows, budget)
    return [whole] if step == rows else list(_ranges(part, rows, step))


def _step(exprs: Sequence[Expr], rows: int, budget: int) -> int:
    """The most rows, by halving, whose working set fits, or the fewest before too much work would be repeated."""
    step, allowed = rows, _REDUNDANCY * work(exprs)
    while step > 1 and working_set([take(expr, 0, 0, step) for expr in exprs]) > budget:
        half = -(-step // 2)
        if work([take(expr, 0, 0, half) for expr in exprs]) * -(-rows // half) > allowed:
            break
        step = half
    return step


def _ranges(part: Mapping[str, Expr], rows: int, step: int) -> Iterator[Task]:
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        pieces = tuple(Piece(name, take(expr, 0, start, stop), start) for name, expr in part.items())
        yield Task(pieces, tuple(part) if stop == rows else ())
