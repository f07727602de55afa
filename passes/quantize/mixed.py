"""How many bits each weight gets: shared out so that what rounding is predicted to cost the model is least.

Of a row r with second moments H of its inputs and an upper factor U of their inverse, `in_order` loses the sum over j
of (e_j / U_jj)^2, e_j being what rounding column j alone costs; rounding to nearest loses e H e^T. Errors of different
rows are independent, so the model loses 1/2 sum over rows of M_rr times that, M being the second moment of its loss's
gradient at what leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compiler.allocate import Option, allocate
from compiler.calibration.fidelity import spread
from compiler.calibration.moments import Moments, Statistics, measure
from compiler.calibration.products import matrix_shape, products
from compiler.ir.graph import Graph, Param
from compiler.pipeline import Context
from compiler.weights.ops.codec import Codec
from passes.quantize.solve import Problem, damped, inverse_factor, nearest

MOMENT_TOKENS = 16384
GRADIENT_TOKENS = 8192
ROWS = 256  # of a matrix, evenly spaced: enough to tell what rounding costs it

CodecOf = Callable[[Param, int], Codec]
Groups = Sequence[Sequence[Param]]


def together(graph: Graph, params: Sequence[Param]) -> list[list[Param]]:
    """Weights that multiply the same value, which get the same bits: runtimes fuse such maps into one."""
    found: dict[object, list[Param]] = {}
    for param in params:
        nodes = products(graph).get(param, [])
        shared = len(nodes) == 1 and nodes[0].op.name == "linear"
        found.setdefault(nodes[0].input(0) if shared else param, []).append(param)
    return list(found.values())


def shared_out(
    graph: Graph,
    ctx: Context,
    params: Sequence[Param],
    bits: float,
    widths: Sequence[int],
    codec_of: CodecOf,
    *,
    solved: bool,
) -> dict[Param, int]:
    """One of ``widths`` for each of ``params``, with at most ``bits`` a weight on average and the least predicted loss.

    ``solved`` says that columns will make up for one another. Weights that the model's first output does not depend
    on, of which nothing is known, are left out.
    """
    if not params:
        return {}
    batches = ctx.calibration()
    spreads = spread(batches, MOMENT_TOKENS), spread(batches, GRADIENT_TOKENS)
    known = measure(graph, params, spreads[0], ctx.progress, gradients=spreads[1])
    losses = {
        tuple(group): _losses(ctx, known, group, widths, codec_of, solved=solved) for group in together(graph, params)
    }
    losses = {group: own for group, own in losses.items() if any(own)}
    sizes = [sum(param.type.numel for param in group) for group in losses]
    ways = [
        [Option(size * width, loss) for width, loss in zip(widths, own, strict=True)]
        for size, own in zip(sizes, losses.values(), strict=True)
    ]
    chosen = dict(zip(losses, allocate(ways, bits * sum(sizes)) if ways else [], strict=True))
    for group, index in chosen.items():
        kept = [width / widths[-1] for width in widths]
        ctx.weighed(", ".join(param.name for param in group), kept, losses[group], kept[index])
    return {param: widths[index] for group, index in chosen.items() for param in group}


def _losses(
    ctx: Context, known: Statistics, group: Sequence[Param], widths: Sequence[int], codec_of: CodecOf, *, solved: bool
) -> list[float]:
    """What each of ``widths`` costs the model, of weights ``group`` that multiply the same value."""
    pivots = _pivots(group[0], known.of(group[0])) if solved else None
    each = [_predicted(ctx, param, known.of(param), [codec_of(param, w) for w in widths], pivots) for param in group]
    return [sum(costs) for costs in zip(*each, strict=True)]


def _predicted(
    ctx: Context, param: Param, moments: Moments, codecs: Sequence[Codec], pivots: Tensor | None
) -> list[float]:
    """What rounding ``param`` by each codec costs the model, in the units of ``compiler.calibration.moments``."""
    experts, rows, columns = matrix_shape(param)
    chosen = torch.arange(0, rows, max(1, rows // ROWS))
    matrices = ctx.read(param).float().reshape(experts, rows, columns)
    seconds, costs = moments.second.reshape(experts, columns, columns), _row_costs(moments, (experts, rows))
    totals = [0.0 for _ in codecs]
    for expert, matrix in enumerate(matrices):
        problem = Problem(matrix[chosen], damped(seconds[expert]))
        for index, codec in enumerate(codecs):
            lost = _lost(problem, codec.for_matrix(matrix), None if pivots is None else pivots[expert])
            totals[index] += float(lost @ costs[expert][chosen])
    return [total / 2 * rows / len(chosen) for total in totals]


def _pivots(param: Param, moments: Moments) -> Tensor:
    """The diagonal of U [experts, columns], the same for all that multiply what ``param`` does."""
    experts, _, columns = matrix_shape(param)
    seconds = moments.second.reshape(experts, columns, columns)
    return torch.stack([inverse_factor(damped(second)).diagonal() for second in seconds])


def _lost(problem: Problem, codec: Codec, pivots: Tensor | None) -> Tensor:
    """What each row loses when it is rounded, in order by ``pivots`` if there are any: float64 [rows]."""
    error = problem.wanted - nearest(problem, codec, weighted=pivots is not None).values
    if pivots is not None:
        return (error / pivots).square().sum(1, dtype=torch.float64)
    return (error @ problem.second * error).sum(1, dtype=torch.float64)


def _row_costs(moments: Moments, shape: tuple[int, int]) -> Tensor:
    """The diagonal of M: float64 [experts, rows]."""
    gradient = moments.gradient
    assert gradient is not None  # it was asked for
    whole = gradient.numel() > shape[0] * shape[1]
    return (gradient.diagonal(dim1=-2, dim2=-1) if whole else gradient).reshape(shape)


def evenly(groups: Groups, bits: float, widths: Sequence[int]) -> dict[Param, int]:
    """The widths around ``bits``, as many of each as make the average, without knowing what would be best."""
    below, above = max(w for w in widths if w <= bits), min(w for w in widths if w >= bits)
    left = (bits - below) * sum(param.type.numel for group in groups for param in group)
    found: dict[Param, int] = {}
    for group in groups:
        more = (above - below) * sum(param.type.numel for param in group)
        own = above if 0 < more <= left else below
        found.update(dict.fromkeys(group, own))
        left -= more if own == above else 0
    return found
