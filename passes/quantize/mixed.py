"""How many bits each weight gets: shared out so that what rounding is predicted to cost the model is least.

Of a row with second moments H of its inputs and an upper factor U of their inverse, `in_order` makes an error e U, e_j
being what rounding column j alone costs over U_jj. On other inputs, of second moments H', that costs the sum over j of
e_j^2 (U H' U^T)_jj: more than by H, which U is fitted to, and the more so the fewer tokens H is of. H' is measured on
batches that are held out. Rounding to nearest loses e H e^T. Errors of different rows are independent, so the model
loses 1/2 sum over rows of M_rr times that, M being the second moment of its loss's gradient at what leaves.

M is a sum over the vectors that a matrix meets, so that an expert counts by how often it is chosen and with what
weight (MC-MoE, arXiv 2410.06270, multiplies frequency, weight and error). Each counts as if it had met about one
average vector more: of one that calibration data does not choose nothing is known, and not that it is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compiler.allocate import Option, allocate
from compiler.calibration.fidelity import spread
from compiler.calibration.moments import Moments, Statistics, measure
from compiler.calibration.products import matrix_shape, products
from compiler.calibration.sequence import HELD_OUT, Batches
from compiler.ir.graph import Graph, Param
from compiler.pipeline import Context
from compiler.weights.ops.codec import Codec
from passes.quantize.experts import Bits, Matrix, bits_of, matrices
from passes.quantize.solve import Problem, damped, inverse_factor, nearest

MOMENT_TOKENS = 16384
GRADIENT_TOKENS = 8192
ROWS = 256  # of a matrix, evenly spaced: enough to tell what rounding costs it

CodecOf = Callable[[Param, int], Codec]
Places = Sequence[Sequence[Matrix]]
Losses = Mapping[tuple[Matrix, ...], Sequence[float]]
"""By what gets the same width, what each width costs."""

EVEN, SPREAD = "the same bits for each", "the widths around the average, spread"
APART = "each expert by cost"


def together(graph: Graph, params: Sequence[Param]) -> list[list[Param]]:
    """Weights that multiply the same value, which get the same bits: runtimes fuse such maps into one."""
    found: dict[object, list[Param]] = {}
    known = products(graph)
    for param in params:
        nodes = known.get(param, [])
        shared = len(nodes) == 1 and nodes[0].op.name == "linear"
        found.setdefault(nodes[0].input(0) if shared else param, []).append(param)
    return list(found.values())


@dataclass(frozen=True)
class Data:
    """Calibration batches in two parts: those to measure and to solve on, and those held out, by which to choose."""

    rest: Batches
    held: Batches

    @staticmethod
    def of(batches: Batches) -> Data:
        """Every eighth batch is held out; a single one is both parts."""
        if len(batches) < 2:
            return Data(batches, batches)
        return Data([batch for i, batch in enumerate(batches) if i % HELD_OUT], batches[::HELD_OUT])


def predicted(
    graph: Graph,
    ctx: Context,
    params: Sequence[Param],
    data: Data,
    widths: Sequence[int],
    codec_of: CodecOf,
    *,
    solved: bool,
) -> Losses:
    """What each of ``widths`` costs the model, for weights of ``params`` that multiply the same value and for experts.

    ``solved`` says that columns will make up for one another. Weights that the model's first output does not depend
    on, of which nothing is known, are left out.
    """
    if not params:
        return {}
    gradients = spread([*data.rest, *data.held], GRADIENT_TOKENS)
    rest = measure(graph, params, spread(data.rest, MOMENT_TOKENS), ctx.progress, gradients=gradients)
    held = measure(graph, params, spread(data.held, MOMENT_TOKENS), ctx.progress) if solved else rest
    found: dict[tuple[Matrix, ...], list[float]] = {}
    for group in together(graph, params):
        own = _losses(ctx, (rest, held), group, widths, codec_of, solved=solved)
        if any(map(any, own)):
            found |= zip(map(tuple, matrices(group, apart=True)), own, strict=True)
    return found


def whole(losses: Losses) -> Losses:
    """``losses`` where all experts of a stack get the same width."""
    found: dict[tuple[Matrix, ...], list[float]] = {}
    for group, own in losses.items():
        key = tuple(Matrix(matrix.param) for matrix in group)
        found[key] = [before + more for before, more in zip(found.get(key, [0.0] * len(own)), own, strict=True)]
    return found


def allotments(losses: Losses, bits: float, widths: Sequence[int], *, apart: bool = False) -> dict[str, Bits]:
    """Ways to give each weight one of ``widths``, with at most ``bits`` a weight on average, to be measured.

    Those of least predicted loss, of all widths and of the two around ``bits``; and, as what neither should be worse
    than, these two spread over the model without a prediction, in the order of which the least is predicted. ``apart``
    adds that in which experts of a stack may differ.
    """
    if not losses:
        return {}
    found = _alike(whole(losses), bits, widths)
    if apart:
        found[APART] = least(losses, bits, widths, widths)
    return {what: bits_of(own) for what, own in found.items()}


def _alike(losses: Losses, bits: float, widths: Sequence[int]) -> dict[str, Mapping[Matrix, int]]:
    around = [max(width for width in widths if width <= bits), min(width for width in widths if width >= bits)]
    found: dict[str, Mapping[Matrix, int]] = {"shared out by cost": least(losses, bits, widths, widths)}
    if around[0] < around[1]:
        found[f"{around[0]} and {around[1]} bits by cost"] = least(losses, bits, widths, around)
        groups = list(losses)
        orders = (groups, groups[::-1], [*groups[::2], *groups[1::2]])
        ways = [evenly(order, bits, around) for order in orders]
        found[SPREAD] = min(ways, key=lambda way: total(losses, widths, way))
    return found


def least(losses: Losses, bits: float, widths: Sequence[int], among: Sequence[int]) -> dict[Matrix, int]:
    """Widths ``among`` those that losses are of, with at most ``bits`` a weight on average and the least loss."""
    sizes = [_size(group) for group in losses]
    ways = [
        [Option(size * width, own[widths.index(width)]) for width in among]
        for size, own in zip(sizes, losses.values(), strict=True)
    ]
    chosen = zip(losses, allocate(ways, bits * sum(sizes)), strict=True)
    return {matrix: among[index] for group, index in chosen for matrix in group}


def total(losses: Losses, widths: Sequence[int], bits: Mapping[Matrix, int]) -> float:
    """What the model is predicted to lose by ``bits``."""
    return sum(own[widths.index(bits[group[0]])] for group, own in losses.items())


def _size(group: Sequence[Matrix]) -> int:
    return sum(matrix.size for matrix in group)


def _losses(
    ctx: Context,
    known: tuple[Statistics, Statistics],
    group: Sequence[Param],
    widths: Sequence[int],
    codec_of: CodecOf,
    *,
    solved: bool,
) -> list[list[float]]:
    """What each of ``widths`` costs the model, for each expert of weights ``group`` that multiply the same value."""
    rest, held = known
    counts = column_costs(group[0], _filled(rest.of(group[0])), held.of(group[0])) if solved else None
    found = torch.zeros(matrix_shape(group[0])[0], len(widths), dtype=torch.float64)
    for param in group:
        found += _predicted(ctx, param, _filled(rest.of(param)), [codec_of(param, w) for w in widths], counts)
    return found.tolist()


def _filled(moments: Moments) -> Moments:
    """``moments`` with those of all experts together for experts that calibration data does not choose."""
    if moments.count.ndim == 0 or bool((moments.count > 0).all()) or not bool(moments.count.any()):
        return moments
    mean = torch.einsum("e,eij->ij", moments.count / moments.count.sum(), moments.second)
    return replace(moments, second=moments.second.where((moments.count > 0)[:, None, None], mean))


def _predicted(ctx: Context, param: Param, moments: Moments, codecs: Sequence[Codec], counts: Tensor | None) -> Tensor:
    """What rounding each expert of ``param`` by each codec costs the model: float64 [experts, codecs].

    In the units of ``compiler.calibration.moments``.
    """
    experts, rows, columns = matrix_shape(param)
    chosen = torch.arange(0, rows, max(1, rows // ROWS))
    matrices = ctx.read(param).float().reshape(experts, rows, columns)
    seconds, costs = moments.second.reshape(experts, columns, columns), _row_costs(moments, (experts, rows))
    found = torch.zeros(experts, len(codecs), dtype=torch.float64)
    for expert, matrix in enumerate(matrices):
        problem = Problem(matrix[chosen], damped(seconds[expert]))
        for index, codec in enumerate(codecs):
            lost = _lost(problem, codec.for_matrix(matrix), None if counts is None else counts[expert])
            found[expert, index] = lost @ costs[expert][chosen]
    return found / 2 * (rows / len(chosen))


def column_costs(param: Param, rest: Moments, held: Moments) -> Tensor:
    """What a square of each column's own error costs: float32 [experts, columns], the same for all of one input.

    Of experts that held-out batches do not reach it is taken to be what it costs on the others.
    """
    experts, _, columns = matrix_shape(param)
    found: list[Tensor] = []
    parts = (rest.second, held.second, held.count)
    shapes = ((experts, columns, columns), (experts, columns, columns), (experts,))
    for second, other, count in zip(
        *(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)), strict=True
    ):
        factor = inverse_factor(damped(second))
        spilt = ((factor @ other.float()) * factor).sum(1) if count > 0 else torch.ones(columns)
        found.append(spilt / factor.diagonal().square())
    return torch.stack(found)


def _lost(problem: Problem, codec: Codec, counts: Tensor | None) -> Tensor:
    """What each row loses when it is rounded, in order by ``counts`` if there are any: float64 [rows]."""
    error = problem.wanted - nearest(problem, codec, weighted=counts is not None).values
    if counts is not None:
        return (error.square() @ counts).double()
    return (error @ problem.second * error).sum(1, dtype=torch.float64)


def _row_costs(moments: Moments, shape: tuple[int, int]) -> Tensor:
    """The diagonal of M: float64 [experts, rows]; of experts as if each had met one vector more."""
    gradient = moments.gradient
    assert gradient is not None  # it was asked for
    whole = gradient.numel() > shape[0] * shape[1]
    found = (gradient.diagonal(dim1=-2, dim2=-1) if whole else gradient).reshape(shape)
    return found + found.sum(0) / moments.count.sum().clamp_min(1) if shape[0] > 1 else found


def evenly(groups: Places, bits: float, widths: Sequence[int]) -> dict[Matrix, int]:
    """The widths around ``bits``, as many of each as make the average, without knowing what would be best."""
    below, above = max(w for w in widths if w <= bits), min(w for w in widths if w >= bits)
    left = (bits - below) * sum(map(_size, groups))
    found: dict[Matrix, int] = {}
    for group in groups:
        more = (above - below) * _size(group)
        own = above if 0 < more <= left else below
        found.update(dict.fromkeys(group, own))
        left -= more if own == above else 0
    return found
