"""One latent for unrotated keys and values: the low-rank pair that errs least where the attention's output notices.

A token's numbers y [Y] become a latent c = down y of r numbers, keys K y are read off as key_up c and values V y as
value_up c. The error is tr(M_K E_K) + tr(M_V E_V), where E_K and E_V are second moments of what is lost, taken under
the weights that keys have and over the means that values are read as, and M_K and M_V say what a loss costs.

With one second moment for both this is solved by eigenvectors (the output PCA of SVD-LLM, Palu and CARE, in a metric).
With two it is not: alternating least squares starts from there, each half exact or by conjugate gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 3
GRADIENT_STEPS = 20
DAMPING = 1e-6
RIDGE = 1e-9


@dataclass(frozen=True)
class Side:
    """What one of the two readers of the latent wants: ``rows`` [n, Y] of the numbers, their errors' ``metric``
    [n, n] and the second ``moment`` [Y, Y] under which errors are taken. All float64."""

    rows: Tensor
    metric: Tensor
    moment: Tensor


@dataclass(frozen=True)
class LatentPair:
    """``down`` [r, Y], ``key_up`` [nk, r], ``value_up`` [nv, r], and the error of each, float64."""

    down: Tensor
    key_up: Tensor
    value_up: Tensor
    key_error: float
    value_error: float


def solve(keys: Side, values: Side, rank: int, rounds: int = ROUNDS) -> LatentPair:
    """The latent of ``rank`` numbers for both sides; exact when the rank reaches the number of rows."""
    if rank >= len(keys.rows) + len(values.rows):
        return _whole(keys, values)
    key_root, key_inverse = _root(keys.metric)
    value_root, value_inverse = _root(values.metric)
    wanted = (key_root @ keys.rows, value_root @ values.rows)
    moments = (keys.moment, values.moment)
    down = _start(wanted, moments, rank)
    ups = _ups(down, wanted, moments)
    errors = _errors(down, ups, wanted, moments)
    for _ in range(rounds):
        nearer = _down(down, ups, wanted, moments)
        ups_of_it = _ups(nearer, wanted, moments)
        found = _errors(nearer, ups_of_it, wanted, moments)
        if not sum(found) < sum(errors):  # where next to nothing is lost, gradients are rounding
            break
        down, ups, errors = nearer, ups_of_it, found
    size = _size(down, values.moment)
    return LatentPair(down / size, key_inverse @ ups[0] * size, value_inverse @ ups[1] * size, *errors)


def _whole(keys: Side, values: Side) -> LatentPair:
    """The rows themselves: nothing is lost, not even what the moments know nothing of."""
    down = torch.cat((keys.rows, values.rows))
    size = _size(down, values.moment)
    up = size * torch.eye(len(down), dtype=down.dtype)
    return LatentPair(down / size, up[: len(keys.rows)], up[len(keys.rows) :], 0.0, 0.0)


def _size(down: Tensor, moment: Tensor) -> float:
    """The root mean square of the latent; 1 where it is always zero."""
    return max(_error(down, moment) / len(down), 0.0) ** 0.5 or 1.0


def _root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of ``metric``, slightly damped so that it has an inverse, and that inverse."""
    if not len(metric):
        return metric, metric
    damping = DAMPING * metric.diagonal().mean() + torch.finfo(torch.float64).tiny
    values, vectors = torch.linalg.eigh(metric + damping * torch.eye(len(metric), dtype=metric.dtype))
    root = values.clamp_min(damping / 2).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _start(wanted: tuple[Tensor, Tensor], moments: tuple[Tensor, Tensor], rank: int) -> Tensor:
    """The optimum under the mean of both second moments."""
    rows = torch.cat(wanted)
    _, vectors = torch.linalg.eigh(rows @ (moments[0] + moments[1]) @ rows.T)
    return vectors[:, -rank:].T @ rows


def _ups(down: Tensor, wanted: tuple[Tensor, Tensor], moments: tuple[Tensor, Tensor]) -> list[Tensor]:
    """For a given way down, the best ways up: least squares."""
    ups: list[Tensor] = []
    for rows, moment in zip(wanted, moments, strict=True):
        seen = down @ moment
        gram = seen @ down.T
        gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(torch.float64).tiny)
        ups.append(torch.linalg.solve(gram, seen @ rows.T).T)
    return ups


def _down(down: Tensor, ups: list[Tensor], wanted: tuple[Tensor, Tensor], moments: tuple[Tensor, Tensor]) -> Tensor:
    """For given ways up, a better way down: conjugate gradients from the present one."""
    grams = [up.T @ up for up in ups]

    def normal(x: Tensor) -> Tensor:
        return grams[0] @ x @ moments[0] + grams[1] @ x @ moments[1]

    parts = zip(ups, wanted, moments, strict=True)
    residual = sum((up.T @ rows @ moment for up, rows, moment in parts), torch.zeros_like(down)) - normal(down)
    direction, size = residual, (residual * residual).sum()
    for _ in range(GRADIENT_STEPS):
        image = normal(direction)
        curvature = (direction * image).sum()
        if not curvature > 0:
            break
        step = size / curvature
        down, residual = down + step * direction, residual - step * image
        before, size = size, (residual * residual).sum()
        direction = residual + size / before * direction
    return down


def _errors(
    down: Tensor, ups: list[Tensor], wanted: tuple[Tensor, Tensor], moments: tuple[Tensor, Tensor]
) -> list[float]:
    return [_error(up @ down - rows, moment) for up, rows, moment in zip(ups, wanted, moments, strict=True)]


def _error(lost: Tensor, moment: Tensor) -> float:
    return float((lost @ moment * lost).sum())
