"""Forms of factors that are no pair: Tucker factors of heads, tensor trains, dense times sparse."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.safetensors import emit
from compiler.errors import PassError
from compiler.evaluate import load_model
from compiler.factor import Metric, root
from compiler.ir.execute import read_param, run
from compiler.ir.facts import flops_per_token
from compiler.ir.graph import Param
from compiler.ir.verify import verify
from compiler.pipeline import Pipeline
from compiler.target import emission_of
from compiler.weights.expr import load
from compiler.weights.ops.basic import full
from compiler.weights.ops.sparse import as_scatter
from compiler.weights.spill import SpillSource
from passes.low_rank import LowRank
from passes.low_rank.places import bias_of
from passes.low_rank.select import places_of
from passes.low_rank.sparse import DenseSparse
from passes.low_rank.train import Train
from passes.low_rank.tucker import Tucker
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, distance
from tests.families import FAMILIES
from tests.test_low_rank import FLOAT64, Silent, batches, moment, reduced

CHEAP = {"ranks": "uniform", "update": False}


def place_of(form, rows, columns):
    expr = full((rows, columns), 0.0, torch.float64)
    param = Param("layer.weight", expr.type, expr=expr, storage=torch.float64)
    match form:
        case "heads made":
            return Tucker((param,), (rows // 4,), False)
        case "heads read":
            return Tucker((param,), (columns // 4,), True)
        case "sparse":
            return DenseSparse((param,))
        case _:
            return Train((param,))


def metric_of(place, seed, diagonal):
    """Random moments such as the form takes them to be: products of those of a train's cores, heads that are apart."""
    generator = torch.Generator().manual_seed(seed)

    def moments(size, parts, heads):
        if parts is not None:
            return torch.kron(*(moment(part, generator) for part in parts))
        return torch.block_diag(*(moment(size // heads, generator) for _ in range(heads)))

    a, b, c, d = place.cut if isinstance(place, Train) else (0, 0, 0, 0)
    cuts = ((a, c), (b, d)) if isinstance(place, Train) else (None, None)
    heads = place.heads[0] if isinstance(place, Tucker) else 1
    apart = (1, heads) if isinstance(place, Tucker) and place.writes else (heads, 1)
    found = [moments(*one) for one in zip((place.height, place.columns), cuts, apart, strict=True)]
    left, right = (root(one.diagonal() if diagonal else one, 0.0) for one in found)
    return Metric((left,), right)


@settings(max_examples=10, deadline=None)
@given(
    form=st.sampled_from(["tensor-train", "heads made", "heads read", "sparse"]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    diagonal=st.booleans(),
)
def test_more_rank_never_costs_more_and_costs_what_was_predicted(form, rows, columns, seed, diagonal):
    place = place_of(form, 4 * rows, 4 * columns)
    metric = metric_of(place, seed, diagonal)
    weight = torch.randn(place.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    costs, whole = place.costs(weight, metric), metric.cost(weight)
    assert len(costs) == place.most
    assert float(costs.min()) >= -FLOAT64 * whole
    sizes = [place.numbers(rank) for rank in range(1, place.most + 1)]
    assert sizes == sorted(set(sizes))
    found = [
        metric.cost(weight - place.approximated(weight, metric, rank).matrix()) for rank in range(1, place.most + 1)
    ]
    assert found[-1] <= 1e-6 * whole
    assert all(after <= before + 1e-6 * whole for before, after in pairwise(found))
    for rank, (size, cost) in enumerate(zip(sizes, found, strict=True), 1):
        if size <= place.full:
            assert cost == pytest.approx(float(costs[rank:].sum()), rel=1e-6, abs=1e-6 * whole)


def whole(graph, form, params, share="none"):
    """Put factors of full rank in the place of ``params``, in ``graph`` itself."""
    spill = SpillSource()
    graph.sources["spill"] = spill

    def keep(name, tensor):
        key = spill.add(name, tensor)
        return load("spill", key, spill.types[key])

    places = places_of(graph, Silent(), params, form)
    for place in places:
        weight = read_param(graph, place.params[0]).double()
        metric = Metric(*((torch.ones(place.height).double(),), torch.ones(place.columns).double()))
        bias = bias_of(place.params[0])
        made = place.approximated(weight, metric, place.most)
        made.stored(keep, place, None if bias is None else read_param(graph, bias).double()).write(graph, place)
    return places


WHOLE = [
    *(("tucker", name) for name in ("llama", "gpt2", "bert", "vit", "whisper", "t5", "qwen3")),
    *(("tensor-train", name) for name in ("llama", "vit")),
    *(("sparse", name) for name in ("gpt2", "whisper")),
]


@pytest.mark.parametrize(("form", "name"), WHOLE)
def test_the_full_rank_computes_the_same(form, name):
    graph = graph_of(name)
    inputs = FAMILIES[name].inputs()
    before = run(graph, inputs)
    linear = [node.input(1) for node in graph.nodes_named("linear")]
    params = [param for param in dict.fromkeys(linear) if isinstance(param, Param)]
    assert len(whole(graph, form, params)) >= 8
    verify(graph)
    assert distance(run(graph, inputs), before) < 1e-4


WRITTEN = [
    *(("tucker", name) for name in ("llama", "gpt2", "vit", "whisper")),
    *(("tensor-train", name) for name in ("llama", "vit")),
    *(("sparse", name) for name in ("gpt2", "whisper")),
]


@pytest.mark.parametrize(("form", "name"), WRITTEN)
def test_the_plan_is_what_the_run_makes_and_is_written_as_code_that_computes_the_same(form, name, tmp_path):
    options = {"where": ["attention", "mlp"], "keep": 0.7, "form": form, **CHEAP}
    graph, planned, inputs = graph_of(name), graph_of(name), FAMILIES[name].inputs()
    (report,) = Pipeline([LowRank(**options)]).run(graph, calibration=lambda _: batches(name, 2)).passes
    Pipeline([LowRank(**options)]).run(planned, planned=True, calibration=lambda _: [])
    assert {p.name: p.type for p in planned.params.values()} == {p.name: p.type for p in graph.params.values()}
    before = sum(item.numbers["parameters_before"] for item in report.rewritten)
    after = sum(item.numbers["parameters_after"] for item in report.rewritten)
    assert 0.5 * before < after <= 0.7 * before
    emit(emission_of(graph, "auto"), graph.sources, tmp_path)
    with torch.no_grad():
        found = load_model(tmp_path, trust_remote_code=True)(**inputs)
    assert distance(found, run(graph, inputs)) < TOLERANCE


@pytest.mark.parametrize("form", ["tensor-train", "sparse"])
def test_ranks_follow_from_costs_and_factors_from_what_factors_before_left(form):
    _, report, _ = reduced("llama", keep=0.75, form=form, update=True)
    assert len(report.trials) == 3
    (chosen,) = (trial for trial in report.trials if trial.chosen)
    assert chosen.distance == min(trial.distance for trial in report.trials)
    assert all(item.numbers["predicted_loss"] >= 0 for item in report.rewritten)


def test_projections_of_one_input_share_both_factors_of_their_heads(tmp_path):
    options = {"where": "attention", "keep": 0.6, "form": "tucker", "share": "input"}
    graph, report, _ = reduced("llama", **options, ranks="uniform")
    shared = [item for item in report.rewritten if "shared_q_proj_k_proj_v_proj" in item.scope]
    assert [item.what.rpartition(", ")[2] for item in shared] == ["Tucker factors of 8 heads"] * 2
    firsts = [param for param in graph.params.values() if "shared_q_proj_k_proj_v_proj" in param.name]
    seconds = [param for param in graph.params.values() if param.name.endswith("q_proj.up.weight")]
    assert [len(param.users) for param in (*firsts, *seconds)] == [1, 1, 3, 3]
    emit(emission_of(graph, "auto"), graph.sources, tmp_path)
    inputs = FAMILIES["llama"].inputs()
    with torch.no_grad():
        found = load_model(tmp_path, trust_remote_code=True)(**inputs)
    assert distance(found, run(graph, inputs)) < TOLERANCE


def test_a_linear_map_that_meets_parts_of_a_token_counts_as_often():
    """Kronecker products multiply every part of a token: fewer numbers, and more arithmetic."""
    graph = plan_of("llama")
    before = flops_per_token(graph)
    Pipeline([LowRank(where="mlp", keep=0.5, form="tensor-train", **CHEAP)]).run(graph, planned=True)
    (up,) = (param for param in graph.params.values() if param.name.endswith("layers.0.mlp.up_proj.inner.weight"))
    place = Train((plan_of("llama").params["model.layers.0.mlp.up_proj.weight"],))
    assert int(up.users and next(iter(up.users)).input(0).shape[-2]) == place.cut[1]
    assert flops_per_token(graph) > before


def test_two_of_four_elements_remain_and_are_stored_so():
    graph, _, _ = reduced("llama", where="mlp", keep=0.7, form="sparse", **CHEAP)
    firsts = [param for param in graph.params.values() if param.name.endswith("down.weight")]
    assert len(firsts) == 2 * 3
    for param in firsts:
        assert as_scatter(param.expr) is not None
        zeros = (read_param(graph, param) == 0).unflatten(-1, (-1, 4)).sum(-1)
        assert int(zeros.min()) >= 2


@pytest.mark.parametrize(
    ("form", "share", "where", "reason"),
    [
        ("sparse", "input", "linear", "are not shared by `input`"),
        ("tensor-train", "layers", "linear", "are not shared by `layers`"),
        ("tucker", "values", "linear", "are not shared by `values`"),
        ("tucker", "none", "mlp", "none of the selected weights can be factorised"),
        ("tensor-train", "none", "embedding", "none of the selected weights can be factorised"),
    ],
)
def test_what_a_form_cannot_be_is_refused(form, share, where, reason):
    with pytest.raises(PassError, match=reason):
        Pipeline([LowRank(where=where, form=form, share=share, keep=0.5)]).run(plan_of("llama"), planned=True)
