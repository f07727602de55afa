"""Codes for one matrix by what enters it: column by column, then refined where they stand.

What is minimised is the sum over rows of e H e^T, e being the rows of the error and H the damped second moment of what
enters. `in_order` is GPTQ (arXiv 2210.17323): columns are rounded one after the other, and those that are left make up
for the error so far. Groups are taken whole, the one with the largest inputs first, and each is given its parameters
when its turn comes, from columns that have taken up the errors before it; so no column needs to know its group, as
activation order would have it. `refined` then fits all scales of a row together by least squares and rounds every
column once more given all others (coordinate descent, as QuantEase, arXiv 2309.01885), as long as that pays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.errors import PassError
from compiler.weights.ops.blockfloat import grouped
from compiler.weights.ops.codebook import Codebook
from compiler.weights.ops.codec import Codec, Parameters
from passes.quantize.places import DAMPING
from passes.quantize.tables import fitted_tables

DAMPINGS = (DAMPING, 0.001, 0.003, 0.03, 0.1)
BLOCK = 128  # columns whose errors are carried to the rest together
ROUNDS = 4  # of refinement, at most
GAIN = 0.005  # of the error: a round that gains less is the last
RIDGE = 1e-4  # of the mean energy of a row's groups: what a departure of its scales costs
FACTORS = (0.5, 2.0)  # between which scales change in a round
SCALE_ELEMENTS = 1 << 24  # of the equations for scales that are solved together
TRIED_ROWS = 64  # of a matrix, at least, that show whether rounding to nearest comes near
NEAR = 0.9  # of its cost: what costs less on those rows costs less on all


@dataclass(frozen=True)
class Problem:
    """A matrix float32 [rows, columns] that is wanted, and the second moment H float32 [columns, columns], damped."""

    wanted: Tensor
    second: Tensor

    def costs(self, values: Tensor) -> Tensor:
        """What each row of ``values`` costs in the place of the matrix's: float64 [rows]."""
        error = self.wanted - values
        return (error @ self.second).mul_(error).sum(1, dtype=torch.float64)

    def cost(self, values: Tensor) -> float:
        """What ``values`` in the place of the matrix cost."""
        return float(self.costs(values).sum())


@dataclass(frozen=True)
class Solution:
    """Codes [rows, columns], parameters [rows, groups] each, and the values float32 that they stand for."""

    codes: Tensor
    parameters: Parameters
    values: Tensor


def damped(second: Tensor, damping: float = DAMPING) -> Tensor:
    """``second`` [columns, columns] in float32, with damping; the identity where nothing was seen."""
    mean = float(second.diagonal().mean())
    ones = torch.eye(len(second), dtype=second.dtype)
    return (second + damping * mean * ones if mean else ones).float()


def nearest(problem: Problem, codec: Codec, *, weighted: bool) -> Solution:
    """Every group fitted by itself and rounded to nearest, ``weighted`` by the energy of inputs or not."""
    wanted, energy = problem.wanted, problem.second.diagonal()
    cuts = list(_cuts(wanted.shape[1], codec.group))
    fitted = [codec.at(i).fit(wanted[:, cut], energy[cut] if weighted else None) for i, cut in enumerate(cuts)]
    codes = [codec.encode(wanted[:, cut], own) for cut, own in zip(cuts, fitted, strict=True)]
    return _of(codec, torch.cat(codes, 1), _stacked(fitted))


def solve(problem: Problem, codec: Codec, *, refine: bool) -> Solution:
    """The best of `in_order`, refined if asked, and of both ways to round to nearest.

    These are tried on some rows first, and on all where they come near there.
    """
    found = in_order(problem, codec)
    if refine:
        found = refined(problem, codec, found)
    step = len(problem.wanted) // TRIED_ROWS if codec.by_rows else 0
    if step > 1:
        some = Problem(problem.wanted[::step], problem.second)
        if some.cost(found.values[::step]) < NEAR * min(some.cost(each.values) for each in _plain(some, codec)):
            return found
    return min((found, *_plain(problem, codec)), key=lambda each: problem.cost(each.values))


def _plain(problem: Problem, codec: Codec) -> Iterator[Solution]:
    return (nearest(problem, codec, weighted=weighted) for weighted in (True, False))


def chosen_damping(wanted: Tensor, rest: Tensor, held: Tensor, codec: Codec) -> float:
    """The damping by which codes chosen for ``rest`` cost least by ``held``, second moments of other vectors."""
    aside = Problem(wanted, damped(held, 0.0))

    def cost(damping: float) -> float:
        problem = Problem(wanted, damped(rest, damping))
        own = codec.for_matrix(wanted, problem.second.diagonal())
        return aside.cost(in_order(problem, own).values)

    return min(DAMPINGS, key=cost)


def in_order(problem: Problem, codec: Codec) -> Solution:
    """Columns one after the other. Raises PassError when H is no positive definite matrix of finite numbers."""
    columns = problem.wanted.shape[1]
    order = _order(problem.second.diagonal(), codec.group or columns)
    factor = inverse_factor(problem.second[order][:, order])
    weight = problem.wanted[:, order]
    codes: list[Tensor] = []
    fitted: list[Parameters] = []
    for cut in _cuts(columns, codec.group):
        own_codec = codec.at(int(order[cut.start]) // (codec.group or columns))
        fitted.append(own_codec.fit(weight[:, cut], factor.diagonal()[cut].square().reciprocal()))
        for block in _blocks(cut):
            own, errors = _rounded(weight[:, block], factor[block, block], codec, fitted[-1])
            codes.append(own)
            weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    place = order.argsort()
    group = codec.group or columns
    parameters = tuple(part[:, place[::group] // group] for part in _stacked(fitted))
    return _of(codec, torch.cat(codes, 1)[:, place], parameters)


def _order(energy: Tensor, group: int) -> Tensor:
    """Groups by the largest energy in them, and the columns of each by theirs, descending; as they are where uneven."""
    if len(energy) % group:
        return torch.arange(len(energy))
    grouped = energy.view(-1, group)
    first = grouped.amax(1).argsort(descending=True)
    return (first[:, None] * group + grouped.argsort(1, descending=True)[first]).flatten()


def inverse_factor(second: Tensor) -> Tensor:
    """The upper Cholesky factor U of the inverse, U^T U: from H = V V^T, V upper, U is the inverse of V."""
    from scipy.linalg import get_lapack_funcs

    turned = second.flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(turned)
    if failed:
        lower, failed = torch.linalg.cholesky_ex(turned.double())
    if failed:
        raise PassError(
            "second moments of inputs are no finite numbers", remedy="look at the model's activations on this data"
        )
    factor = lower.float().numpy()
    (invert,) = get_lapack_funcs(("trtri",), (factor,))  # a third of the work of solving for the identity
    return torch.from_numpy(invert(factor, lower=1)[0]).flip(0, 1).contiguous()


def _cuts(columns: int, step: int) -> Iterator[slice]:
    """``columns`` cut into runs of ``step`` (0: one run), of which the last may be shorter."""
    step = step or columns
    return (slice(start, min(start + step, columns)) for start in range(0, columns, step))


def _blocks(cut: slice) -> Iterator[slice]:
    return (slice(cut.start + own.start, cut.start + own.stop) for own in _cuts(cut.stop - cut.start, BLOCK))


def _rounded(block: Tensor, factor: Tensor, codec: Codec, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """Codes of ``block``, column by column. With them what each column lost, over its pivot."""
    codes: list[Tensor] = []
    left = block.T.contiguous()
    errors = torch.empty_like(left)
    for column, pivot in enumerate(factor.diagonal().tolist()):
        codes.append(codec.encode(left[column, :, None], parameters))
        lost = left[column] - codec.decode(codes[-1], parameters)[:, 0]
        torch.div(lost, pivot, out=errors[column])
        left[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
    return torch.cat(codes, 1), errors.T


def _stacked(fitted: Sequence[Parameters]) -> Parameters:
    """Parameters [rows] of every group as [rows, groups]."""
    return tuple(torch.stack(parts, 1) for parts in zip(*fitted, strict=True))


def _of(codec: Codec, codes: Tensor, parameters: Parameters) -> Solution:
    values = [
        codec.decode(codes[:, cut], tuple(part[:, group] for part in parameters))
        for group, cut in enumerate(_cuts(codes.shape[1], codec.group))
    ]
    return Solution(codes, parameters, torch.cat(values, 1))


def refined(problem: Problem, codec: Codec, found: Solution) -> Solution:
    """``found``, its scales and codes improved in turns; never worse."""
    cost = problem.cost(found.values)
    for _ in range(ROUNDS):
        scaled = _of(codec, found.codes, _refitted(problem, codec, found))
        if problem.cost(scaled.values) > cost:
            scaled = found
        other = _descended(problem, codec, scaled)
        before, after = cost, problem.cost(other.values)
        if after >= before:
            return found
        found, cost = other, after
        if after > (1 - GAIN) * before:
            break
    return found


def _refitted(problem: Problem, codec: Codec, found: Solution) -> Parameters:
    """Other parameters for the same codes, by least squares: all numbers of tables, or scales alone."""
    if isinstance(codec, Codebook):
        return fitted_tables(problem.wanted, problem.second, codec, found.codes, found.parameters)
    return codec.rescaled(found.parameters, _factors(problem, codec, found).clamp(*FACTORS))


def _factors(problem: Problem, codec: Codec, found: Solution) -> Tensor:
    """By what to multiply the scales [rows, groups] of each row for the least error with these codes: least squares."""
    wanted = problem.wanted @ problem.second
    step = max(1, SCALE_ELEMENTS // found.parameters[0].shape[1] ** 2)
    rows = _cuts(len(wanted), step)
    return torch.cat([_factors_of(problem.second, codec.group, found.values[own], wanted[own]) for own in rows])


def _factors_of(second: Tensor, group: int, values: Tensor, wanted: Tensor) -> Tensor:
    """Of values [rows, columns], given W H [rows, columns]."""
    cuts = list(_cuts(values.shape[1], group))
    equations = torch.empty(len(values), len(cuts), len(cuts))
    for index, cut in enumerate(cuts):
        equations[:, index] = grouped((values[:, cut] @ second[cut]) * values, group).sum(-1)
    aims = grouped(wanted * values, group).sum(-1)
    diagonal = equations.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    diagonal += ridge
    return torch.linalg.solve(equations, aims + ridge)


def _descended(problem: Problem, codec: Codec, found: Solution) -> Solution:
    """Every column rounded once more, given all others."""
    codes, values = found.codes.clone(), found.values.clone()
    pull = (problem.wanted - values) @ problem.second
    for group, cut in enumerate(_cuts(values.shape[1], codec.group)):
        own = tuple(part[:, group] for part in found.parameters)
        for block in _blocks(cut):
            moved = _moved(problem, codec, own, block, codes, values, pull[:, block])
            pull[:, : block.start] -= moved @ problem.second[block, : block.start]
            pull[:, block.stop :] -= moved @ problem.second[block, block.stop :]
    return Solution(codes, found.parameters, values)


def _moved(
    problem: Problem,
    codec: Codec,
    parameters: Parameters,
    block: slice,
    codes: Tensor,
    values: Tensor,
    pull: Tensor,
) -> Tensor:
    """Round the columns of ``block`` in place, each where ``pull`` = E H [rows, block] draws it. Returns the moves."""
    second = problem.second[block, block]
    moves = torch.empty_like(pull)
    for index, column in enumerate(range(block.start, block.stop)):
        aim = values[:, column] + pull[:, index] / second[index, index]
        code = codec.encode(aim[:, None], parameters)
        value = codec.decode(code, parameters)[:, 0]
        moves[:, index] = value - values[:, column]
        codes[:, column], values[:, column] = code[:, 0], value
        pull -= torch.outer(moves[:, index], second[index])
    return moves
