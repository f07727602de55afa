"""One first factor for several matrices: adjacent layers, tables and what they are looked up and scored by."""

from __future__ import annotations

import pytest
import torch

from backends.safetensors import emit
from compiler.evaluate import load_model
from compiler.ir.execute import read_param, run
from compiler.ir.facts import kv_cache_values
from compiler.ir.graph import Param
from compiler.ir.layers import copy_of
from compiler.ir.verify import verify
from compiler.pipeline import Pipeline
from compiler.target import emission_of
from compiler.weights.expr import load
from compiler.weights.spill import Progress, SpillSource
from passes.low_rank import LowRank
from passes.low_rank.groups import sharing, together
from passes.low_rank.keys import Keys
from passes.low_rank.metrics import measured
from passes.low_rank.places import Place
from passes.low_rank.select import places_of
from passes.low_rank.shared import Shared
from passes.low_rank.values import Values
from tests.captures import graph_of
from tests.emitted import TOLERANCE, distance
from tests.families import FAMILIES


class Silent:
    """A context that nobody reads."""

    planned = False

    def __init__(self, graph):
        self.graph, self.progress = graph, Progress()
        graph.sources["spill"] = SpillSource()

    def skipped(self, scope, reason):
        pass

    def read(self, param):
        return read_param(self.graph, param)

    def spill(self, name, tensor):
        spill = self.graph.sources["spill"]
        key = spill.add(name, tensor)
        return load("spill", key, spill.types[key])


def batches(name, count=4):
    return [FAMILIES[name].inputs(batch=2, tokens=24, seed=seed) for seed in range(count)]


def of_kind(name, metric, wanted, share="none", **changes):
    """The graph, its metrics, and those places of it that ``wanted`` says."""
    graph = graph_of(name, **changes)
    ctx = Silent(graph)
    selected = [param for param in graph.params.values() if isinstance(param, Param) and param.type.rank in (2, 3)]
    places = places_of(graph, ctx, [param for param in selected if wanted(param)])
    groups = [together(group, share) for group in sharing(places, share)]
    options = LowRank(metric=metric, keep=0.5, bias=False)
    return graph, measured(graph, ctx, places, options, batches(name)), [g for g in groups if isinstance(g, Shared)]


def looked_up(param):
    return any(node.op.name == "embedding" for node in param.users)


KINDS = [
    ("llama", True, "loss"),
    ("llama", False, "loss"),
    ("bert", True, "plain"),
    ("whisper", True, "input"),
    ("t5", True, "scaled"),
]


@pytest.mark.parametrize(("name", "tied", "metric"), KINDS)
def test_tables_of_full_rank_compute_the_same_and_more_rank_never_costs_more(name, tied, metric):
    graph, metrics, places = of_kind(name, metric, looked_up, tie_word_embeddings=tied)
    before, inputs = run(graph, FAMILIES[name].inputs()), FAMILIES[name].inputs()
    assert places
    for place in places:
        costs = place.basis(metrics).costs
        assert (costs >= 0).all()
        whole = copy_of(graph)
        place.factorised(metrics, place.columns).write(whole, place)
        verify(whole)
        assert distance(run(whole, inputs), before) < 1e-4
        lossy = copy_of(graph)
        place.factorised(metrics, min(place.shape) // 2).write(lossy, place)
        assert distance(run(lossy, inputs), before) > 1e-4


@pytest.mark.parametrize(("name", "metric"), [("mixtral", "loss"), ("qwen3_moe", "scaled"), ("gpt_oss", "loss")])
def test_a_basis_of_experts_of_full_rank_computes_the_same_and_is_written(name, metric, tmp_path):
    def stacked(param):
        return any(node.op.name == "experts" for node in param.users)

    graph, metrics, places = of_kind(name, metric, stacked)
    inputs = FAMILIES[name].inputs()
    before = run(graph, inputs)
    assert {place.writes for place in places} == ({False} if name == "gpt_oss" else {False, True})
    whole = copy_of(graph)
    for place in places:
        assert (place.basis(metrics).costs >= 0).all()
        place.factorised(metrics, place.columns).write(whole, place)
    verify(whole)
    assert distance(run(whole, inputs), before) < 1e-4
    for place in places:
        place.factorised(metrics, place.columns // 3).write(graph, place)
    emit(emission_of(graph, "auto"), graph.sources, tmp_path)
    with torch.no_grad():
        found = load_model(tmp_path, trust_remote_code=True)(**inputs)
    assert distance(found, run(graph, inputs)) < TOLERANCE


@pytest.mark.parametrize(
    ("share", "kind", "name"),
    [
        *(("values", Values, name) for name in ("llama", "gpt2", "vit", "whisper")),
        *(("keys", Keys, name) for name in ("gpt2", "vit", "whisper")),
    ],
)
def test_narrower_heads_of_full_width_compute_the_same_and_are_written(share, kind, name, tmp_path):
    graph, metrics, places = of_kind(name, "loss", lambda param: True, share=share)
    inputs = FAMILIES[name].inputs()
    before = run(graph, inputs)
    places = [place for place in places if isinstance(place, kind)]
    assert places
    whole = copy_of(graph)
    for place in places:
        assert (place.saved(metrics) >= 0).all()
        place.factorised(metrics, place.most).write(whole, place)
    verify(whole)
    assert distance(run(whole, inputs), before) < 1e-4
    for place in places:
        place.factorised(metrics, place.most // 2).write(graph, place)
    verify(graph)
    assert kv_cache_values(graph) <= kv_cache_values(whole)
    emit(emission_of(graph, "generated"), graph.sources, tmp_path)
    with torch.no_grad():
        found = load_model(tmp_path, trust_remote_code=True)(**inputs)
    assert distance(found, run(graph, inputs)) < TOLERANCE


def test_keys_that_are_turned_by_their_positions_share_nothing_with_queries():
    _, _, places = of_kind("llama", "input", lambda param: True, share="keys")
    assert not [place for place in places if isinstance(place, Keys)]


@pytest.mark.parametrize(
    ("name", "where"),
    [("mixtral", "experts"), ("bert", "embedding"), ("whisper", "head"), ("qwen2", "attention"), ("gpt2", "attention")],
)
def test_the_plan_of_shared_factors_holds_what_the_run_holds(name, where):
    options = {"where": where, "keep": 0.6, "ranks": "uniform", "update": False, "share": "values"}
    graph, planned = (graph_of(name) for _ in range(2))
    Pipeline([LowRank(**options)]).run(graph, calibration=lambda _: batches(name, 2))
    Pipeline([LowRank(**options)]).run(planned, planned=True, calibration=lambda _: [])
    assert {p.name: p.type for p in planned.params.values()} == {p.name: p.type for p in graph.params.values()}


def test_the_plan_of_narrower_keys_holds_what_the_run_holds():
    options = {"where": "attention", "keep": 0.7, "ranks": "uniform", "update": False, "share": "keys"}
    graph, planned = (graph_of("gpt2") for _ in range(2))
    (report,) = Pipeline([LowRank(**options)]).run(graph, calibration=lambda _: batches("gpt2", 2)).passes
    Pipeline([LowRank(**options)]).run(planned, planned=True, calibration=lambda _: [])
    assert {p.name: p.type for p in planned.params.values()} == {p.name: p.type for p in graph.params.values()}
    assert sum("multiplied into" in item.what for item in report.rewritten) == 2
    assert report.after.cache_bytes_per_token < report.before.cache_bytes_per_token


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "whisper", "t5"])
def test_factorised_tables_are_written_as_code_that_computes_the_same(name, tmp_path):
    inputs, graph = FAMILIES[name].inputs(), graph_of(name, tie_word_embeddings=True)
    options = {"where": ["embedding", "head"], "keep": 0.7, "ranks": "uniform", "update": False}
    (report,) = Pipeline([LowRank(**options)]).run(graph, calibration=lambda _: batches(name, 2)).passes
    assert report.rewritten
    after = sum(item.numbers["parameters_after"] for item in report.rewritten)
    before = sum(item.numbers["parameters_before"] for item in report.rewritten)
    assert report.before.parameters - report.after.parameters == before - after
    emit(emission_of(graph, "auto"), graph.sources, tmp_path)
    with torch.no_grad():
        found = load_model(tmp_path, trust_remote_code=True)(**inputs)
    assert distance(found, run(graph, inputs)) < TOLERANCE


def test_queries_and_keys_alone_share_their_first_factor_where_that_is_asked():
    """Only `share: keys` narrows heads."""
    graph = graph_of("bert")
    params = [param for param in graph.params.values() if param.name.endswith(("query.weight", "key.weight"))]
    for share, kind in (("input", Place), ("keys", Keys)):
        groups = sharing(places_of(graph, Silent(graph), params), share)
        assert {type(together(group, share)) for group in groups} == {kind}
