"""The metric of what removal costs, where gradients are few and of very different sizes."""

from __future__ import annotations

import pytest
import torch

from compiler.calibration.moments import Moments
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.ir.facts import parameter_count
from compiler.pipeline import Pipeline
from passes.prune import Prune
from passes.prune.ranking import GRADIENT_RIDGE, Reader, in_metric, inputs, restored, surgeon
from passes.prune.refit import _Sums, fitted
from tests.test_removal import Convolutional, residual_net


def moments(width: int, out: int, generator: torch.Generator) -> Moments:
    x, g = (torch.randn(4 * n, n, generator=generator, dtype=torch.float64) for n in (width, out))
    mixed = x @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    return Moments(torch.tensor(1.0), mixed.mean(0), mixed.T @ mixed / len(x), g.T @ g / len(g))


@pytest.mark.parametrize("count", [1, 2, 40, 400])
def test_few_gradients_summed_in_float32_are_a_metric(count):
    """Rounding in float32 leaves eigenvalues below zero, further than the ridge reaches."""
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 300, generator=source)
    gradient = (rows.T @ rows).double()
    weight = torch.randn(300, 20, generator=source, dtype=torch.float64)
    made = in_metric(weight, gradient)
    expected = weight.T @ gradient @ weight
    ridge = 1e3 * GRADIENT_RIDGE * gradient.diagonal().mean() * (weight.T @ weight).diagonal().max()
    torch.testing.assert_close(made.T @ made, expected, rtol=1e-4, atol=ridge.item())


@pytest.mark.parametrize("width", [1, 3])
def test_the_predicted_loss_is_that_of_the_restored_columns_and_grows_with_what_goes(width):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 8 * width, generator=generator, dtype=torch.float64)
    known = moments(8 * width, 5, generator)
    reader = Reader(weight, [list(range(i * width, (i + 1) * width)) for i in range(8)], known)
    ranking = surgeon([reader], 8)
    assert sorted(ranking.order) == list(range(8))
    assert (ranking.losses.diff() <= 0).all() and ranking.losses[8] == 0
    for count in (7, 4, 1):
        kept = ranking.kept(count)
        error = weight.clone()
        error[:, reader.remaining(kept)] -= restored(reader, kept)
        cost = 0.5 * (known.gradient @ error @ inputs(known) * error).sum()
        torch.testing.assert_close(ranking.losses[count], cost, rtol=1e-3, atol=0)  # the surgeon works in float32


def test_restored_columns_are_better_than_plain_ones():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    reader = Reader(weight, [[i] for i in range(12)], moments(12, 4, generator))
    kept = list(range(8))
    plain, made = weight.clone(), weight.clone()
    plain[:, :8] -= weight[:, :8]
    made[:, :8] -= restored(reader, kept)
    second = reader.moments.second
    assert (made @ second * made).sum() < (plain @ second * plain).sum()


def test_a_fit_is_kept_only_if_it_is_better_on_what_it_did_not_see():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    seen, unseen = _Sums.of(3, 6), _Sums.of(3, 6)
    for sums, count in ((seen, 40), (unseen, 20)):
        x = torch.randn(count, 6, generator=generator)
        sums.add(x, x @ (weight.float() + 0.5).T, torch.ones(count, 1))
    made, before, after = fitted(weight, seen, unseen)
    assert after < before
    torch.testing.assert_close(made, weight + 0.5, rtol=0, atol=0.05)
    noise = _Sums.of(3, 6)
    noise.add(torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator), torch.ones(4, 1))
    right = _Sums.of(3, 6)
    x = torch.randn(50, 6, generator=generator)
    right.add(x, x @ weight.float().T, torch.ones(50, 1))
    kept, before, after = fitted(weight, noise, right)
    assert kept is weight and before == after


def test_channels_of_a_convolutional_net_are_pruned_by_what_they_cost():
    torch.manual_seed(0)
    given = [{"image": torch.randn(2, 3, 12, 12)} for _ in range(4)]
    graph = capture(Convolutional().eval(), inputs=given[0])
    before = parameter_count(graph)
    step = Prune(what="channels", where=("conv", "linear"), keep=0.8, align=2)
    (entry,) = Pipeline([step]).run(graph, calibration=lambda _: given).passes
    assert parameter_count(graph) < 0.82 * before
    assert any("conv" not in done.scope and "channels" in done.what for done in entry.rewritten)
    assert torch.isfinite(run(graph, given[0])["output"]).all()


def test_channels_of_a_residual_net_are_pruned_in_its_stages_too():
    torch.manual_seed(1)
    given = [{"image": torch.randn(2, 3, 32, 32)} for _ in range(4)]
    graph = capture(residual_net(), inputs=given[0])
    before = parameter_count(graph)
    step = Prune(what="channels", where=("conv", "linear"), keep=0.7, align=2)
    (entry,) = Pipeline([step]).run(graph, calibration=lambda _: given).passes
    assert 0.5 * before < parameter_count(graph) < 0.72 * before
    assert any(done.scope == "head" and "of 16 channels" in done.what for done in entry.rewritten)
    assert torch.isfinite(run(graph, given[0])["output"]).all()
