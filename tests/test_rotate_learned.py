"""Rotations that are learned: orthogonal all the way, down the slope, exact, and kept where held-out windows agree."""

from __future__ import annotations

import pytest
import torch

from compiler.calibration.distil.whole import Pair
from compiler.errors import PassError
from compiler.ir.execute import run
from compiler.ir.ops.hadamard import basis
from compiler.pipeline import Pipeline
from passes import Rotate
from passes.rotate import learned
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, distance
from tests.families import FAMILIES
from tests.test_sparsify import batches

WANTED = Rotate(what="stream", learn=4, bits=3, group=16)


def rotated(name, step=WANTED, directory=None, count=4):
    graph = graph_of(name)
    given = batches(name, count=count)
    (report,) = Pipeline([step]).run(graph, workdir=directory, calibration=lambda _: given).passes
    return graph, report


@pytest.mark.parametrize("size", [8, 12])
def test_steps_stay_orthogonal_and_go_down(size):
    source = torch.Generator().manual_seed(size)
    aim = torch.linalg.qr(torch.randn(size, size, generator=source, dtype=torch.float64)).Q
    found = basis(size)
    losses = [float((found - aim).square().sum())]
    for _ in range(40):
        slope = (found - aim) @ found.T
        found = learned.stepped(found, slope - slope.T, 0.02)
        losses.append(float((found - aim).square().sum()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert learned.stepped(found, torch.zeros(size, size).double(), 0.02) is found


@pytest.mark.parametrize(
    ("shape", "axes"), [((8, 5), (0,)), ((5, 8), (1,)), ((8, 8), (0, 1)), ((3, 8, 5), (1,)), ((8,), (0,))]
)
def test_slopes_by_the_basis_are_those_of_autograd(shape, axes):
    source = torch.Generator().manual_seed(1)
    weight, gradient = (torch.randn(*shape, generator=source) for _ in range(2))
    own = torch.randn(8, 8, generator=source).requires_grad_()
    part = learned._Turned(weight, axes, None, own)
    (expected,) = torch.autograd.grad((part._along(axes) * gradient).sum(), own)
    part.basis = own.detach()
    torch.testing.assert_close(part.slope(gradient), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_is_learned_is_exact_and_the_nearer_is_taken(name):
    graph, report = rotated(name)
    inputs = FAMILIES[name].inputs()
    assert distance(run(graph, inputs), run(graph_of(name), inputs)) <= TOLERANCE
    before, after = report.trials
    assert [trial.chosen for trial in report.trials] == [
        before.distance <= after.distance,
        after.distance < before.distance,
    ]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    wanted, _ = rotated("llama")
    monkeypatch.setattr(learned, "SAVE_SECONDS", 0.0)
    done, gradients = 0, Pair.gradients

    def counting(*given):
        nonlocal done
        done += 1
        if done == 3:
            raise KeyboardInterrupt
        return gradients(*given)

    monkeypatch.setattr(Pair, "gradients", counting)
    with pytest.raises(KeyboardInterrupt):
        rotated("llama", directory=tmp_path)
    found, _ = rotated("llama", directory=tmp_path)
    assert done == WANTED.learn + 1
    assert [param.expr.key for param in found.params.values()] == [param.expr.key for param in wanted.params.values()]


@pytest.mark.parametrize(
    ("step", "count", "message"),
    [
        (Rotate(what="values", learn=2), 10, "for streams alone"),
        (Rotate(learn=2, group=7), 10, "groups of 7 do not divide"),
        (Rotate(learn=2), 1, "two windows"),
    ],
)
def test_what_cannot_be_learned_is_an_error(step, count, message):
    with pytest.raises(PassError, match=message):
        rotated("llama", step, count=count)


def test_a_group_that_divides_no_width_is_refused_before_a_run():
    with pytest.raises(PassError, match="groups of 48 do not divide") as caught:
        Pipeline([Rotate(what="stream", learn=2, group=48)]).run(plan_of("llama"), planned=True)
    assert caught.value.option == "group"


@pytest.mark.parametrize(("step", "option"), [(Rotate(bits=3), "bits"), (Rotate(group=32), "group")])
def test_an_option_of_learning_without_learning_is_named(step, option):
    with pytest.raises(PassError, match="nothing is rounded") as caught:
        Pipeline([step]).run(plan_of("llama"), planned=True)
    assert caught.value.option == option
