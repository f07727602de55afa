"""Fits of latent attention: low-rank pairs and refitted projections, beside what is best by their definitions."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

from passes.gqa_to_mla.lowrank import LatentPair, Side, solve
from passes.gqa_to_mla.refit import refitted


def error_of(pair: LatentPair, keys: Side, values: Side) -> float:
    """What ``pair`` loses, from the definition."""
    lost = [(up @ pair.down - side.rows, side) for up, side in ((pair.key_up, keys), (pair.value_up, values))]
    return sum(float(torch.trace(side.metric @ off @ side.moment @ off.T)) for off, side in lost)


def semidefinite(generator: torch.Generator, size: int, rank: int, decay: float) -> Tensor:
    factor = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return (factor * decay ** torch.arange(rank, dtype=torch.float64)) @ factor.T


@st.composite
def problems(draw: st.DrawFn) -> tuple[Side, Side]:
    """A reader of keys (of none, sometimes) and one of values, metrics and moments of any rank."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width, count = draw(st.integers(2, 12)), draw(st.integers(0, 6))
    decay = draw(st.sampled_from([1.0, 0.7, 0.2]))
    sides = []
    for rows in (count, draw(st.integers(1, 6))):
        metric = semidefinite(generator, rows, draw(st.integers(0, rows)), decay)
        moment = semidefinite(generator, width, draw(st.integers(1, width)), decay)
        sides.append(Side(torch.randn(rows, width, generator=generator, dtype=torch.float64), metric, moment))
    return sides[0], sides[1]


def nothing_kept(keys: Side, values: Side) -> float:
    return sum(float(torch.trace(side.metric @ side.rows @ side.moment @ side.rows.T)) for side in (keys, values))


def damping(keys: Side, values: Side) -> float:
    """What the damping of metrics (1e-6 of their mean) and the ridge may cost, generously."""
    sides = ((side.metric.diagonal().mean() if len(side.rows) else 0.0, side) for side in (keys, values))
    damped = sum(1e-5 * float(mean * torch.trace(side.rows @ side.moment @ side.rows.T)) for mean, side in sides)
    return damped + 1e-8 * nothing_kept(keys, values) + 1e-300


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 12))
def test_least_squares_never_does_worse_than_its_start(problem, rank):
    keys, values = problem
    rank = min(rank, len(keys.rows) + len(values.rows))
    errors = [error_of(solve(keys, values, rank, rounds), keys, values) for rounds in (0, 1, 3, 6)]
    slack = damping(keys, values)
    assert all(later <= earlier + slack for earlier, later in pairwise(errors))
    assert errors[0] <= nothing_kept(keys, values) + slack
    found = solve(keys, values, rank)
    assert all(torch.isfinite(part).all() for part in (found.down, found.key_up, found.value_up))
    assert abs(found.key_error + found.value_error - errors[2]) <= slack + 1e-9 * abs(errors[2])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_more_rank_is_never_worse_and_all_of_it_is_exact(problem):
    keys, values = problem
    most = len(keys.rows) + len(values.rows)
    errors = [error_of(solve(keys, values, rank, 0), keys, values) for rank in range(1, most + 1)]
    slack = damping(keys, values)
    assert all(more <= less + slack for less, more in pairwise(errors))
    pair = solve(keys, values, most)
    assert torch.allclose(pair.key_up @ pair.down, keys.rows, rtol=0, atol=1e-12)
    assert torch.allclose(pair.value_up @ pair.down, values.rows, rtol=0, atol=1e-12)
    assert (pair.key_error, pair.value_error) == (0.0, 0.0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 6))
def test_with_one_moment_it_is_the_closed_form_and_no_worse_than_a_plain_svd(problem, rank):
    """The least possible error is the sum of the smallest eigenvalues of the metric's root times the covariance."""
    keys, values = problem
    width = values.rows.shape[1]
    moment = values.moment + 1e-3 * values.moment.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    keys, values = Side(keys.rows, keys.metric, moment), Side(values.rows, values.metric, moment)
    rows = torch.cat((keys.rows, values.rows))
    rank = min(rank, len(rows))
    metric = torch.block_diag(*(side.metric for side in (keys, values) if len(side.rows)))
    values_of, vectors = torch.linalg.eigh(metric)
    root = (vectors * values_of.clamp_min(0).sqrt()) @ vectors.T
    least = float(torch.linalg.eigvalsh(root @ rows @ moment @ rows.T @ root)[: len(rows) - rank].clamp_min(0).sum())
    error = error_of(solve(keys, values, rank), keys, values)
    assert abs(error - least) <= damping(keys, values) + 1e-6 * least
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    off = (left[:, :rank] * sizes[:rank]) @ right[:rank] - rows
    assert error <= float(torch.trace(metric @ off @ moment @ off.T)) + damping(keys, values)


def test_metrics_and_moments_of_zero_give_numbers():
    eye, none = torch.eye(6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    for metric, moment in ((none[:3, :3], eye), (eye[:3, :3], none), (none[:3, :3], none)):
        side = Side(eye[:3], metric, moment)
        for rank in range(1, 7):
            pair = solve(side, Side(eye[3:], metric, moment), rank)
            assert all(torch.isfinite(part.float()).all() for part in (pair.down, pair.key_up, pair.value_up))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9), st.integers(1, 30))
def test_refitting_never_increases_the_error_that_it_was_fitted_to(seed, width, outputs, tokens):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, width, generator=generator)
    pairs = [[torch.randn(2, tokens, n, generator=generator) for n in (width, outputs)] for _ in range(2)]

    def error(matrix: Tensor) -> float:
        return sum(float((x.double() @ matrix.double().T - y).square().sum()) for x, y in pairs)

    fitted = refitted(weight, iter([(x, y) for x, y in pairs]))
    assert error(fitted) <= error(weight) * (1 + 1e-6)


def test_refitting_keeps_weights_whose_inputs_are_zero_or_whose_outputs_are_right():
    weight, x = torch.randn(3, 5), torch.randn(40, 5)
    assert torch.allclose(refitted(weight, [(torch.zeros(4, 5), torch.randn(4, 3))]).float(), weight)
    assert torch.allclose(refitted(weight, [(x, x @ weight.T)]).float(), weight, atol=1e-5)
    x[:, 2] = 0
    kept = refitted(weight, [(x, torch.randn(40, 3))])[:, 2]
    assert torch.allclose(kept.float(), weight[:, 2])
