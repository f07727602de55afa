"""Products beside quantised weights: nearer with every rank, within the numbers that were allowed, and written."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from backends.safetensors import emit
from compiler.calibration.fidelity import Fidelity
from compiler.errors import PassError
from compiler.evaluate import load_model
from compiler.ir.execute import run
from compiler.pipeline import Pipeline
from compiler.target import emission_of
from passes.quantize import Quantize
from passes.residual import Residual
from tests.captures import graph_of
from tests.emitted import TOLERANCE, distance
from tests.families import FAMILIES

WHERE = ["attention", "mlp"]


def batches(name, count=4):
    return [FAMILIES[name].inputs(batch=2, tokens=24, seed=seed) for seed in range(count)]


def made(name, **options):
    """A family's graph after quantising and the pass, its report, and the distance from the original."""
    graph, given = graph_of(name), batches(name)
    before = Fidelity(graph, given)
    passes = [Quantize(where=WHERE, bits=3), Residual(**{"where": WHERE, **options})]
    report = Pipeline(passes).run(graph, calibration=lambda _: given).passes[1]
    return graph, report, before.distance(graph)


@pytest.mark.parametrize("metric", ["plain", "input"])
def test_more_products_bring_the_model_nearer(metric):
    distances = [made("llama", add=add, metric=metric, ranks="uniform")[2] for add in (0.1, 0.4, 0.9)]
    assert all(after < before for before, after in pairwise(distances))


@pytest.mark.parametrize("name", ["llama", "bert", "whisper", "gpt2"])
def test_what_is_chosen_is_nearest_holds_no_more_than_allowed_and_is_written(name, tmp_path):
    graph, report, _ = made(name, add=0.2)
    assert [trial.distance for trial in report.trials if trial.chosen] == [min(t.distance for t in report.trials)]
    added = sum(item.numbers["parameters_added"] for item in report.rewritten)
    assert report.after.parameters - report.before.parameters == added
    assert 0 < added <= 0.2 * report.before.parameters
    emit(emission_of(graph, "auto"), graph.sources, tmp_path)
    inputs = FAMILIES[name].inputs()
    with torch.no_grad():
        found = load_model(tmp_path, trust_remote_code=True)(**inputs)
    assert distance(found, run(graph, inputs)) < TOLERANCE


def test_the_plan_holds_what_a_uniform_run_holds():
    options = {"where": WHERE, "add": 0.2, "ranks": "uniform", "metric": "plain"}
    graph, planned = (graph_of("llama") for _ in range(2))
    for one in (graph, planned):
        Pipeline([Quantize(where=WHERE), Residual(**options)]).run(one, planned=one is planned)
    assert {p.name: p.type for p in planned.params.values()} == {p.name: p.type for p in graph.params.values()}


def test_dense_weights_and_too_few_numbers_are_errors():
    graph = graph_of("llama")
    with pytest.raises(PassError, match="none of the selected weights is quantised"):
        Pipeline([Residual(metric="plain", ranks="uniform")]).run(graph)
    with pytest.raises(PassError, match="less than what products of rank 1 hold"):
        Pipeline([Quantize(where=WHERE), Residual(where=WHERE, add=0.001)]).run(graph, planned=True)


@pytest.mark.parametrize("type", ["fp8", "nvfp4"])
def test_floats_are_brought_nearer_too(type):
    graph, beside = (graph_of("llama") for _ in range(2))
    inputs = FAMILIES["llama"].inputs()
    exact = run(graph, inputs)["logits"]
    step = Quantize(where=WHERE, type=type)
    Pipeline([step]).run(graph)
    Pipeline([step, Residual(where=WHERE, add=0.4, ranks="uniform", metric="plain")]).run(beside)
    alone, both = ((run(each, inputs)["logits"] - exact).norm() for each in (graph, beside))
    assert both < alone
