"""Smoothing: exact on families of every kind, no dearer than nothing by its own measure, and refusals with reasons."""

from __future__ import annotations

import pytest
import torch

from backends.safetensors import emit
from compiler.errors import PassError
from compiler.evaluate import load_model
from compiler.pipeline import Pipeline
from compiler.target import emission_of
from passes import Smooth
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, Job, distance
from tests.families import FAMILIES
from tests.graphs import tiny_llama, tokens
from tests.removed import double, outputs, value

ROUNDING = 512 * torch.finfo(torch.float64).eps
OPTIONS = {"bits": 3, "group": 0}


def given(name, count=3):
    """Batches of calibration, in float64 where they are floats."""
    batches = [FAMILIES[name].inputs(batch=2, tokens=12, seed=seed) for seed in range(count)]
    return [{key: x.double() if x.is_floating_point() else x for key, x in batch.items()} for batch in batches]


def smoothed(name, graph, **options):
    return Pipeline([Smooth(**{**OPTIONS, **options})]).run(graph, calibration=lambda _: given(name)).passes[0]


@pytest.mark.parametrize("name", ["gemma", "bert", "vit", "mixtral", "whisper"])
def test_smoothing_changes_nothing_and_costs_less_by_its_own_measure(name):
    family = FAMILIES[name]
    graph = double(graph_of(family.name))
    inputs = family.inputs(batch=2, tokens=5)
    wanted = outputs(graph, inputs)
    report = smoothed(name, graph)
    assert all(rewrite.numbers["relative_cost"] <= 1 for rewrite in report.rewritten)
    assert sum(trial.chosen for trial in report.trials) == 1
    assert min(trial.distance for trial in report.trials) == next(t.distance for t in report.trials if t.chosen)
    for output, found in outputs(graph, inputs).items():
        assert (found - wanted[output]).abs().max() <= ROUNDING * wanted[output].abs().max()


def test_more_to_choose_from_never_costs_more():
    costs = {}
    for method in ("awq", "fit"):
        graph = graph_of("llama")
        report = smoothed("llama", graph, method=method)
        costs[method] = [rewrite.numbers["relative_cost"] for rewrite in report.rewritten]
    chosen = next(trial.what for trial in report.trials if trial.chosen)
    assert "fit" not in chosen or all(a <= b for a, b in zip(costs["fit"], costs["awq"], strict=True))


def test_smoothquant_is_its_formula():
    """In a norm's gain and in the columns of the weights that read it, up to one factor for all channels."""
    graph, before = tiny_llama(layers=1), tiny_llama(layers=1)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    batches = [{"input_ids": tokens(seed=seed)["input_ids"]} for seed in range(2)]
    step = Smooth(where={"name": "*q_proj*"}, method="smoothquant", alpha=0.75)
    Pipeline([step]).run(graph, calibration=lambda _: batches)
    gains = [value(g, g.params["model.layers.0.input_layernorm.weight"]).double() for g in (before, graph)]
    s = gains[0] / gains[1]
    weights = [value(before, before.params[name]).double() for name in names]
    for name, weight in zip(names, weights, strict=True):
        torch.testing.assert_close(value(graph, graph.params[name]).double(), weight * s, rtol=1e-6, atol=0)
    read = torch.cat([entering(before, batch).flatten(0, 1) for batch in batches]).abs().amax(0).double()
    expected = read**0.75 / weights[0].abs().amax(0) ** 0.25
    torch.testing.assert_close(s / s.log().mean().exp(), expected / expected.log().mean().exp(), rtol=1e-4, atol=0)


def entering(graph, batch):
    from compiler.ir.execute import run

    node = next(node for node in graph.nodes_named("linear") if node.scope.endswith("q_proj"))
    found = {}

    def see(seen, tensor):
        if seen is node.input(0):
            found["x"] = tensor

    run(graph, batch, observe=see)
    return found["x"]


def test_powers_of_two_change_stored_weights_exactly(tmp_path):
    job = Job(
        "llama",
        tmp_path,
        [Smooth(where="mlp", method="smoothquant", powers_of_two=True)],
        dtype=torch.bfloat16,
        calibration=lambda _: given("llama"),
    )
    for name, param in job.graph.params.items():
        stored = value(job.graph, param)
        assert not param.persistent or torch.equal(stored.to(torch.bfloat16).to(stored.dtype), stored), name
    assert job.emit().architecture == "LlamaForCausalLM"


def test_what_nothing_absorbs_is_multiplied_when_asked():
    where = {"role": "linear", "name": "*layer*"}
    plain = smoothed("bert", graph_of("bert", layers=1), where=where)
    assert len(plain.skipped) == 5 and len(plain.rewritten) == 1
    graph = graph_of("bert", layers=1)
    inputs = FAMILIES["bert"].inputs()
    wanted = outputs(graph, inputs)["logits"]
    report = smoothed("bert", graph, where=where, insert=True)
    assert not report.skipped and len(report.rewritten) == 4
    assert (outputs(graph, inputs)["logits"] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_nothing_to_smooth_is_an_error():
    with pytest.raises(PassError, match="none of the selected weights"):
        smoothed("gemma", graph_of("gemma"), where="head")


def test_a_group_that_divides_no_width_is_an_error():
    with pytest.raises(PassError, match="groups of 64 do not divide 48") as raised:
        smoothed("llama", graph_of("llama"), group=64)
    assert raised.value.option == "group"


def test_an_exponent_that_nothing_reads_is_refused():
    for method in ("awq", "fit"):
        with pytest.raises(PassError, match="`alpha` is read only by") as error:
            Smooth(method=method, alpha=0.75)
        assert error.value.option == "alpha"


def test_without_calibration_data_it_says_so():
    with pytest.raises(PassError, match="calibration"):
        Pipeline([Smooth()]).run(tiny_llama())


def test_a_plan_says_what_will_be_smoothed():
    graph = plan_of("bert")
    report = Pipeline([Smooth()]).run(graph, planned=True, calibration=lambda _: []).passes[0]
    assert any("absorbed by bert.encoder.layer.0.attention.self.value" in each.what for each in report.rewritten)
    assert any("`gelu`" in each.reason for each in report.skipped)


def test_explicit_scales_are_in_the_generated_module(tmp_path):
    job = Job("bert", tmp_path, [Smooth(insert=True, where="mlp")], calibration=lambda _: given("bert"))
    job.out.mkdir()
    emit(emission_of(job.graph, "generated"), job.graph.sources, job.out)
    with torch.no_grad():
        theirs = load_model(job.out, trust_remote_code=True)(**job.family.inputs())
    assert distance(theirs, job.outputs()) <= TOLERANCE
