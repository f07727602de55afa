"""Codes learned block by block: they start where they were, end nearer, and are not learned twice."""

from __future__ import annotations

import pytest
import torch

from compiler.calibration.fidelity import Fidelity
from compiler.errors import PassError
from compiler.pipeline import Pipeline
from compiler.weights.evaluate import evaluate
from compiler.weights.ops.integer import Integer
from passes.quantize import Quantize
from passes.quantize.learned import Learned, rounding, scaling
from tests.captures import graph_of
from tests.test_packing import bound
from tests.test_sparsify import batches

KINDS = {"rounding": rounding, "scaling": scaling}
CODECS = [(2, 0, True), (3, 8, False), (4, 16, True)]


def started(kind, bits, group, symmetric, shape=(12, 32)):
    """What is learned of a weight, before it is, and its values as rounding gave them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    (expr,), sources = bound(w=weight)
    found = Integer(bits, group, weight.dtype, symmetric).nearest(expr)
    codes, scale, *zero = evaluate(list(found.args), sources)
    made: Learned = KINDS[kind](weight, codes, scale, zero[0] if zero else None, bits)
    return made, evaluate([found], sources)[0], codes, scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(12, 32), (3, 8, 32)])
def test_nothing_learned_is_nothing_changed(kind, codec, shape):
    made, values, codes, scale = started(kind, *codec, shape)
    torch.testing.assert_close(made.value().detach(), values)
    assert all(torch.equal(*pair) for pair in zip(made.settled(), (codes, scale), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", CODECS)
def test_steps_go_down_a_slope_and_stay_within_the_codes(kind, codec):
    """Towards a product that rounding to nearest misses; what is settled is what was learned."""
    made, _, codes, before = started(kind, *codec)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(9)) @ torch.diag(torch.linspace(0.1, 2, 32))
    wanted = x @ torch.randn(12, 32, generator=torch.Generator().manual_seed(codec[0])).T

    def loss():
        return (x @ made.value().T - wanted).square().mean()

    losses = []
    for step in range(60):
        now = loss()
        losses.append(float(now.detach()))
        made.step(torch.autograd.grad(now, made.leaves), step / 60, 60)
    assert min(losses) < losses[0]
    found, scale = made.settled()
    assert found.dtype == codes.dtype and int(found.min()) >= -(2 ** (codec[0] - 1))
    assert int(found.max()) < 2 ** (codec[0] - 1) and torch.equal(scale.sign(), before.sign())


def learned(name, directory=None, **options):
    """A family's graph after the pass, the pass's report, and the distance from the original on calibration data."""
    graph, given = graph_of(name), batches(name)
    before = Fidelity(graph, given)
    (report,) = Pipeline([Quantize(**options)]).run(graph, workdir=directory, calibration=lambda _: given).passes
    return graph, report, before.distance(graph)


@pytest.mark.parametrize("name", ["llama", "mixtral", "vit"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_is_kept_where_it_is_nearer(name, kind):
    options = {"where": "linear", "skip": ("head",), "bits": 2, "group": 8}
    _, _, plain = learned(name, **options)
    _, report, distance = learned(name, **options, learn=kind, steps=30)
    kept = [entry for entry in report.rewritten if "learned on" in entry.what]
    assert all(entry.numbers["loss_after"] < entry.numbers["loss_before"] for entry in kept)
    before, after = report.trials
    assert bool(kept) == after.chosen == (after.distance < before.distance)
    assert distance < plain if kept else distance == plain
    assert kept or name == "vit"


def test_a_run_that_was_interrupted_learns_no_layer_twice(tmp_path, monkeypatch):
    options = {"where": "mlp", "bits": 3, "learn": "rounding", "steps": 8, "method": "gptq"}
    first, _, _ = learned("llama", tmp_path, **options)
    monkeypatch.setattr(Learned, "step", None)
    again, _, _ = learned("llama", tmp_path, **options)
    for name, param in first.params.items():
        ours, theirs = again.params[name], param
        assert torch.equal(*(evaluate([p.expr], g.sources)[0] for p, g in ((ours, again), (theirs, first))))


def test_only_even_steps_are_learned():
    with pytest.raises(PassError, match="codes of nvfp4 are not learned"):
        Pipeline([Quantize(type="nvfp4", learn="rounding")]).run(graph_of("llama"))
