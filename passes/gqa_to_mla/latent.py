"""The matrices of a latent attention that comes near a given one, from what calibration says about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.gqa_to_mla.lowrank import ROUNDS, LatentPair, Side, solve
from passes.gqa_to_mla.moments import Moments, output_energy
from passes.gqa_to_mla.rotary import Components, components
from passes.gqa_to_mla.source import Source, pair_rows


@dataclass(frozen=True)
class Layout:
    """The widths of a latent attention: ``rank`` r, and how many of the g components of each rotary pair stay."""

    rank: int
    kept: tuple[int, ...]

    @property
    def rotary_dim(self) -> int:
        return 2 * sum(self.kept)

    @property
    def cached(self) -> int:
        """Values that are cached per token."""
        return self.rank + self.rotary_dim

    @property
    def frequencies(self) -> list[int]:
        """The pair that each kept component belongs to, in the order of the rotary key."""
        return [pair for pair, count in enumerate(self.kept) for _ in range(count)]


@dataclass(frozen=True)
class LatentMaps:
    """Float64 matrices on a token's numbers y [Y] (keys before rotation, then values) and on queries before rotation.

    ``down`` [r, Y] makes the latent, ``rotary_key`` [R, Y] the rotary key (pairs interleaved), ``query`` [H, n + R, d]
    the query, ``up`` [H*(n + v), r] keys and values. Scores of these are the original's, unscaled. ``freed``,
    ``key_error`` and ``value_error`` are the first-order errors, as parts of the output's energy, of rotation given
    up, and of keys and values in the latent; that of values with the discount of ``_value_metric``.
    """

    down: Tensor
    rotary_key: Tensor
    query: Tensor
    up: Tensor
    freed: float
    key_error: float
    value_error: float

    @property
    def error(self) -> float:
        return self.freed + self.key_error + self.value_error


@dataclass(frozen=True)
class Analysis:
    """An attention with its moments, and the components of its keys. ``energy`` is E|output|^2."""

    source: Source
    moments: Moments
    energy: float
    components: Components


def analyse(source: Source, moments: Moments) -> Analysis:
    energy = output_energy(moments, source.groups)
    return Analysis(source, moments, energy, components(source, moments, energy))


def largest_rank(source: Source, kept: Sequence[int]) -> int:
    """The rank at which nothing is lost beside rotation: unrotated keys and values, all of them."""
    return source.cached - 2 * sum(kept)


def latent_maps(analysis: Analysis, layout: Layout, rounds: int = ROUNDS) -> LatentMaps:
    """The latent attention of ``layout``; exact when every component stays and the rank is the largest.

    ``rounds`` of least squares improve the latent; none of them gives a good estimate of its error.
    """
    source, parts = analysis.source, analysis.components
    kept = torch.tensor(layout.kept, dtype=torch.int64)
    stays = torch.arange(source.groups)[None] < kept[:, None]
    rotary, resting = stays.nonzero(), (~stays).nonzero()
    key_rows = torch.cat((_key_rows(source, parts.key, resting), _passed_key_rows(source)))
    seen = _query_rows(source, parts, resting, phasor=True)
    pair = _solve(analysis, key_rows, seen, layout.rank, rounds)
    reached = kept < source.groups
    query = torch.cat((_resting_query(source, parts, reached), _query_rows(source, parts, rotary)), 1)
    readers = _readers(source, parts, resting, reached)
    keys = readers @ pair.key_up
    values = pair.value_up.reshape(source.groups, source.value_dim, -1)[source.group_of]
    return LatentMaps(
        down=pair.down,
        rotary_key=_key_rows(source, parts.key, rotary),
        query=query,
        up=torch.cat((keys, values), 1).flatten(0, 1),
        freed=float(parts.loss[~stays].sum()),
        key_error=pair.key_error / analysis.energy,
        value_error=pair.value_error / analysis.energy,
    )


def _solve(analysis: Analysis, key_rows: Tensor, seen: Tensor, rank: int, rounds: int) -> LatentPair:
    source, moments = analysis.source, analysis.moments
    key_metric = (seen @ moments.queries @ seen.mT).sum(0) * source.site.scale**2
    # a cap on the scores makes them sensitive to what all keys have in common
    covariance = moments.keys if source.site.softcap else moments.key_covariance
    values = Side(_value_rows(source), _value_metric(source, moments), moments.values)
    return solve(Side(key_rows, key_metric, covariance), values, rank, rounds)


def _value_metric(source: Source, moments: Moments) -> Tensor:
    """W^T W of the output projection, [g*v, g*v], summed over the heads that read a value.

    A head counts less the more keys it mixes. The errors of keys are taken as independent of each other, which makes
    them look small; this gives values the same discount. It is no theorem: measured, it was the best of its powers.
    """
    v = source.value_dim
    metric = torch.zeros(source.groups, v, source.groups, v, dtype=torch.float64)
    for head, group in enumerate(source.group_of):
        metric[group, :, group] += moments.collision[head] * moments.outputs[head]
    return metric.reshape(source.groups * v, source.groups * v)


def _value_rows(source: Source) -> Tensor:
    """The values among a token's numbers, [g*v, Y]."""
    return torch.eye(source.cached, dtype=torch.float64)[source.groups * source.head_dim :]


def _passed_key_rows(source: Source) -> Tensor:
    """The parts of keys that never rotate among a token's numbers, [g*u, Y]."""
    numbers = torch.arange(source.groups * source.head_dim).reshape(source.groups, source.head_dim)
    return torch.eye(source.cached, dtype=torch.float64)[numbers[:, 2 * source.pairs :].flatten()]


def _key_rows(source: Source, coefficients: Tensor, chosen: Tensor) -> Tensor:
    """Real and imaginary parts of the chosen (pair, component), [2c, Y], interleaved."""
    picked = coefficients[chosen[:, 0], chosen[:, 1]]
    rows = _product_rows(source, picked[:, :, None], chosen[:, 0])
    return torch.nn.functional.pad(rows.flatten(1), (0, source.groups * source.value_dim))


def _product_rows(source: Source, factors: Tensor, pairs: Tensor) -> Tensor:
    """Complex ``factors`` [c, h, 1] times the numbers of h heads at ``pairs``, as real rows [2c, h, d]."""
    real, imaginary = pair_rows(source)
    rows = torch.zeros(len(pairs), 2, factors.shape[1], source.head_dim, dtype=torch.float64)
    each = torch.arange(len(pairs))
    rows[each, 0, :, real[pairs]] = factors.real[..., 0]
    rows[each, 0, :, imaginary[pairs]] = -factors.imag[..., 0]
    rows[each, 1, :, real[pairs]] = factors.imag[..., 0]
    rows[each, 1, :, imaginary[pairs]] = factors.real[..., 0]
    return rows.flatten(0, 1)


def _query_rows(source: Source, parts: Components, chosen: Tensor, *, phasor: bool = False) -> Tensor:
    """What a head's query [d] meets the chosen components with, [H, 2c (+ g*u), d]; with the phasor and the parts that
    never rotate when they rest."""
    factors = parts.query[chosen[:, 0], chosen[:, 1]][:, source.group_of]
    if not phasor:
        return _product_rows(source, factors[..., None], chosen[:, 0]).transpose(0, 1)
    factors = factors * parts.phasor[:, chosen[:, 0]].T
    rotated = _product_rows(source, factors[..., None], chosen[:, 0]).transpose(0, 1)
    return torch.cat((rotated, _placed(_passed_query(source), source)), 1)


def _passed_query(source: Source) -> Tensor:
    """The parts of a query that never rotate, [H, u, d]."""
    rows = torch.eye(source.head_dim, dtype=torch.float64)[2 * source.pairs :]
    return rows.expand(source.heads, -1, -1)


def _placed(rows: Tensor, source: Source) -> Tensor:
    """[H, u, X] to [H, g*u, X]: in the place of the head's key head, zero elsewhere."""
    heads, count, width = rows.shape
    placed = torch.zeros(heads, source.groups, count, width, dtype=rows.dtype)
    placed[torch.arange(heads), source.group_of] = rows
    return placed.flatten(1, 2)


def _resting_query(source: Source, parts: Components, reached: Tensor) -> Tensor:
    """The unrotated part of a head's query, [H, n, d]: its numbers at the ``reached`` pairs, each turned by its phasor,
    and those that never rotate."""
    pairs = reached.nonzero()[:, 0]
    turned = _product_rows(source, parts.phasor[:, pairs].T[..., None], pairs).transpose(0, 1)
    return torch.cat((turned, _passed_query(source)), 1)


def _readers(source: Source, parts: Components, resting: Tensor, reached: Tensor) -> Tensor:
    """The unrotated key of a head from resting components and parts that never rotate, [H, n, 2c + g*u]."""
    place = torch.cumsum(reached.long(), 0) - 1
    duals = parts.query.conj()[resting[:, 0], resting[:, 1]][:, source.group_of]
    count = int(reached.sum())
    rows = torch.zeros(source.heads, count, 2, len(resting), 2, dtype=torch.float64)
    each, at = torch.arange(len(resting)), place[resting[:, 0]]
    rows[:, at, 0, each, 0] = duals.real.T
    rows[:, at, 0, each, 1] = -duals.imag.T
    rows[:, at, 1, each, 0] = duals.imag.T
    rows[:, at, 1, each, 1] = duals.real.T
    rotated = rows.reshape(source.heads, 2 * count, 2 * len(resting))
    passed = _placed(torch.eye(source.unrotated, dtype=torch.float64).expand(source.heads, -1, -1), source)
    return torch.stack([torch.block_diag(left, right.T) for left, right in zip(rotated, passed, strict=True)])
