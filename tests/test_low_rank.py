"""Low-rank factors: what may never change, what must shrink, and what is kept of what was promised."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from backends.safetensors import emit
from compiler.calibration.fidelity import Fidelity
from compiler.errors import PassError, SelectorError
from compiler.evaluate import load_model
from compiler.factor import Metric, best, root, spectrum
from compiler.ir.execute import read_param, run
from compiler.ir.facts import parameter_count
from compiler.pipeline import Pipeline
from compiler.target import emission_of
from compiler.weights.expr import load
from compiler.weights.spill import Progress, SpillSource
from passes.low_rank import LowRank, update
from passes.low_rank.basis import Member, basis, seconds
from passes.low_rank.choose import allocated, by_threshold, uniform
from passes.low_rank.groups import sharing, together
from passes.low_rank.places import Form, bias_of
from passes.low_rank.rewrite import stored
from passes.low_rank.select import places_of
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, distance
from tests.families import FAMILIES

FLOAT64 = 1e-9


def batches(name, count=6, tokens=24):
    return [FAMILIES[name].inputs(batch=2, tokens=tokens, seed=seed) for seed in range(count)]


def reduced(name, directory=None, **options):
    """A family's graph after the pass, the pass's report, and the distance from the original on calibration data."""
    graph, given = graph_of(name), batches(name)
    before = Fidelity(graph, given)
    pipeline = Pipeline([LowRank(**{"where": ["attention", "mlp"], **options})])
    (report,) = pipeline.run(graph, workdir=directory, calibration=lambda _: given).passes
    return graph, report, before.distance(graph)


def moment(width, generator, *, rank=None):
    samples = torch.randn(rank or 4 * width, width, generator=generator, dtype=torch.float64)
    return samples.T @ samples / len(samples)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 24), columns=st.integers(2, 24), seed=st.integers(0, 2**16), diagonal=st.booleans())
def test_more_rank_never_costs_more_and_the_spectrum_says_what_it_costs(rows, columns, seed, diagonal):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left = root(moment(rows, generator).diagonal() if diagonal else moment(rows, generator), 1e-3)
    metric = Metric((left,), root(moment(columns, generator), 1e-3))
    found, whole = spectrum(weight, metric), metric.cost(weight)
    costs = []
    for rank in range(1, min(rows, columns) + 1):
        made = [best(weight, metric, rank, pivots, torch.float64) for pivots in (False, True)]
        costs.append(metric.cost(weight - made[0].matrix()))
        torch.testing.assert_close(*(factors.matrix() for factors in made), rtol=1e-6, atol=1e-7)
        assert costs[-1] == pytest.approx(found.lost(rank), rel=1e-6, abs=FLOAT64 * whole)
    assert all(after <= before + FLOAT64 * whole for before, after in pairwise(costs))
    assert costs[-1] <= FLOAT64 * whole


def test_moments_that_are_no_numbers_are_an_error_and_singular_ones_are_not():
    assert root(torch.ones(3, 3, dtype=torch.float64), 0.0).isfinite().all()
    with pytest.raises(PassError, match="no finite numbers"):
        root(torch.full((2, 2), torch.nan, dtype=torch.float64), 1e-3)


def test_no_other_matrix_of_the_rank_costs_less():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    metric = Metric((root(moment(12, generator), 0.0),), root(moment(9, generator), 0.0))
    made = best(weight, metric, 4, False, torch.float64)
    least = metric.cost(weight - made.matrix())
    for scale in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            first, second = (
                factor + scale * torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                for factor in (made.first, made.second)
            )
            assert metric.cost(weight - second @ first) >= least
    plain = torch.linalg.svd(weight)
    truncated = plain.U[:, :4] * plain.S[:4] @ plain.Vh[:4]
    assert metric.cost(weight - truncated) >= least


@pytest.mark.parametrize(
    ("name", "where", "form"),
    [
        ("llama", "linear", "pair"),
        ("gpt2", ["attention", "mlp"], "pivoted"),
        ("vit", ["linear", "conv"], "auto"),
        ("whisper", ["linear", "conv"], "pivoted"),
    ],
)
def test_the_plan_holds_as_many_parameters_as_were_promised_and_as_the_run(name, where, form):
    options = {"where": where, "keep": 0.7, "form": form, "ranks": "uniform", "update": False, "metric": "input"}
    graph, report, _ = reduced(name, **options)
    planned = graph_of(name)
    assert Pipeline([LowRank(**options)]).run(planned, planned=True, calibration=lambda _: []).read_weights
    assert parameter_count(planned) == parameter_count(graph)
    assert {p.name: p.type for p in planned.params.values()} == {p.name: p.type for p in graph.params.values()}
    before = sum(item.numbers["parameters_before"] for item in report.rewritten)
    after = sum(item.numbers["parameters_after"] for item in report.rewritten)
    assert report.before.parameters - report.after.parameters == pytest.approx(before - after, abs=64 * 12)
    assert after <= 0.7 * before
    assert run(graph, batches(name)[0])


def test_keep_counts_the_whole_model_if_asked_to():
    graph = plan_of("llama")
    before = parameter_count(graph)
    Pipeline([LowRank(where="mlp", keep=0.85, of="model", bias=False)]).run(graph, planned=True)
    assert 0.8 * before < parameter_count(graph) <= 0.85 * before
    with pytest.raises(PassError, match="already more than may remain"):
        Pipeline([LowRank(where="mlp", keep=0.3, of="model")]).run(plan_of("llama"), planned=True)


@pytest.mark.parametrize("name", ["bert", "vit", "whisper", "mixtral"])
def test_what_is_chosen_is_no_further_than_the_same_part_of_each(name):
    _, report, distance = reduced(name, keep=0.75, update=False)
    chosen = [trial for trial in report.trials if trial.chosen]
    assert len(chosen) == 1
    assert chosen[0].distance == min(trial.distance for trial in report.trials)
    after = sum(item.numbers["parameters_after"] for item in report.rewritten)
    whole = sum(item.numbers["parameters_before"] for item in report.rewritten)
    assert after < whole
    assert report.after.parameters < report.before.parameters
    assert distance >= 0
    got = {curve.scope: curve for curve in report.curves}
    assert {item.scope for item in report.rewritten} <= set(got)
    for item in report.rewritten:
        curve = got[item.scope]
        assert list(curve.lost) == sorted(curve.lost, reverse=True)
        assert min(curve.lost) <= item.numbers["predicted_loss"] <= max(curve.lost)


def test_the_metric_of_the_loss_and_the_update_bring_the_model_nearer():
    distances = [
        reduced("llama", keep=0.7, ranks="uniform", **options)[2]
        for options in (
            {"metric": "plain", "update": False, "bias": False},
            {"metric": "input", "update": False, "bias": False},
            {"metric": "input", "update": True},
        )
    ]
    assert distances == sorted(distances, reverse=True)


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path):
    found = []
    for directory in (tmp_path / "a", tmp_path / "b", tmp_path / "b"):
        graph, _, _ = reduced("llama", directory, keep=0.75)
        found.append({param.name: param.expr.key for param in graph.params.values()})
        for bundle in list((directory / "progress-0").glob("*"))[::2]:
            bundle.unlink()
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("form", ["auto", "tucker"])
def test_an_update_that_was_killed_goes_on_where_it_was(form, tmp_path, monkeypatch):
    options = {"where": "attention", "keep": 0.75, "form": form, "metric": "input", "ranks": "uniform", "update": True}
    seen: list[str] = []
    observed, save = update._observed, Progress.save

    def counted(theirs, ours, ranked, trial):
        seen.append(ranked.place.name)
        return observed(theirs, ours, ranked, trial)

    def killed(progress, name, tensors):
        save(progress, name, tensors)
        if name.startswith("updated-") and len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(update, "_observed", counted)
    whole, _, _ = reduced("llama", tmp_path / "whole", **options)
    everything, seen[:] = list(seen), []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "save", killed)
        reduced("llama", tmp_path / "torn", **options)
    done, seen[:] = list(seen), []
    again, _, _ = reduced("llama", tmp_path / "torn", **options)
    assert done[:-1] + seen == everything  # of the third input one weight of several was done
    keys = [{param.name: param.expr.key for param in graph.params.values()} for graph in (whole, again)]
    assert keys[0] == keys[1]


def test_what_cannot_be_factorised_is_said():
    _, report, _ = reduced("gpt_oss", where="linear", keep=0.75, update=False, ranks="uniform")
    assert any("the experts add biases" in skip.reason for skip in report.skipped)


def test_impossible_wishes_are_errors():
    wishes = [
        ("llama", {"where": "router", "keep": 0.5}, SelectorError, "selects nothing|matches nothing|no weight"),
        (
            "gpt_oss",
            {"where": "experts.down", "keep": 0.5},
            PassError,
            "none of the selected weights can be factorised",
        ),
        ("llama", {"where": "mlp", "keep": 0.01}, PassError, "leaves less than a rank of 1"),
        ("llama", {"keep": 0.5, "form": "sparse", "ranks": "spectra"}, PassError, "is made without singular values"),
    ]
    for name, options, kind, reason in wishes:
        graph = plan_of(name)
        with pytest.raises(kind, match=reason):
            Pipeline([LowRank(**options)]).run(graph, planned=True)


class Silent:
    """A context that nobody reads."""

    def skipped(self, scope, reason):
        pass


@pytest.mark.parametrize(("name", "form"), [("llama", "pivoted"), ("gpt2", "pair")])
def test_a_shared_first_factor_stands_once_and_computes_the_same_and_is_written(name, form, tmp_path):
    """Of full rank, factors of query, key and value together compute what these did; transformers loads them."""
    family = FAMILIES[name]
    graph = graph_of(family.name)
    inputs = family.inputs()
    before = run(graph, inputs)["logits"]
    params = [param for param in graph.params.values() if "attn" in param.name and param.type.rank == 2]
    spill = SpillSource()
    graph.sources["spill"] = spill

    def keep(name, tensor):
        key = spill.add(name, tensor)
        return load("spill", key, spill.types[key])

    for group in sharing(places_of(graph, Silent(), params), "input"):
        place = together(group, "input")
        weight = torch.cat([read_param(graph, param).double() for param in place.params])
        ones = Metric((torch.ones(place.height, dtype=torch.float64),), torch.ones(place.columns, dtype=torch.float64))
        factors = best(weight, ones, min(weight.shape), form == "pivoted", torch.float32)
        biases = [bias_of(param) for param in place.params]
        bias = torch.cat([read_param(graph, one).double() for one in biases]) if all(biases) else None
        stored(keep, place, factors, bias).write(graph, place)
    after = run(graph, inputs)["logits"]
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4
    firsts = [param for param in graph.params if ".down.weight" in param or ".pivots.weight" in param]
    assert len(firsts) == len({param.rpartition(".")[0] for param in firsts}) == 2 * 2
    emit(emission_of(graph, "generated"), graph.sources, tmp_path)
    with torch.no_grad():
        found = load_model(tmp_path, trust_remote_code=True)(**inputs).logits
    assert float((found - after).abs().max() / after.abs().max()) < 1e-5


WRITTEN = ["llama", "gemma3", "phi3", "mixtral", "gpt2", "modernbert", "vit", "whisper", "t5"]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_the_defaults_select_is_written_as_code_that_computes_the_same(name, tmp_path):
    """Heads, parts of fused weights, layers that differ: also where frequencies or names of modules differ by layer."""
    inputs = FAMILIES[name].inputs()
    graph = graph_of(name)
    Pipeline([LowRank(keep=0.7, update=False)]).run(graph, calibration=lambda _: batches(name, 2))
    emit(emission_of(graph, "auto"), graph.sources, tmp_path)
    with torch.no_grad():
        found = load_model(tmp_path, trust_remote_code=True)(**inputs)
    assert distance(found, run(graph, inputs)) < TOLERANCE


def test_allocation_spends_what_there_is_and_costs_no_more_than_uniform():
    graph = graph_of("llama")
    params = [param for param in graph.params.values() if param.name.endswith("proj.weight")]
    places = places_of(graph, Silent(), params)
    groups = sharing(places, "input")
    assert [len(group) for group in groups] == [3, 1, 2, 1] * 2
    generator = torch.Generator().manual_seed(0)
    costs = {
        place: torch.rand(min(place.height, place.columns), generator=generator, dtype=torch.float64).sort(0, True)[0]
        for place in (*places, *(together(group, "input") for group in groups if len(group) > 1))
    }
    form = Form("auto", bias=False)
    even, shared_out = (
        uniform(places, form, 0.7),
        allocated([(group, together(group, "input")) for group in groups], costs, form, 0.7),
    )

    def total(choice):
        done = {param for ranked in choice for param in ranked.place.params}
        left = sum(place.full for place in places if place.params[0] not in done)
        return left + sum(form.size(ranked.place, ranked.rank) for ranked in choice)

    def cost(choice):
        return sum(float(costs[ranked.place][ranked.rank :].sum()) for ranked in choice)

    budget = 0.7 * sum(place.full for place in places)
    assert total(even) <= budget
    assert 0.97 * budget <= total(shared_out) <= budget
    assert cost(shared_out) <= cost(even)


def test_one_threshold_cuts_all_spectra_and_spends_what_there_is():
    graph = graph_of("llama")
    params = [param for param in graph.params.values() if param.name.endswith("proj.weight")]
    places = places_of(graph, Silent(), params)
    generator = torch.Generator().manual_seed(0)
    costs = {
        place: scale * torch.rand(place.most, generator=generator, dtype=torch.float64).sort(0, True)[0]
        for scale, place in enumerate(places, 1)
    }
    form = Form("pair", bias=False)
    choice = by_threshold(places, costs, form, 0.7)
    left = sum(form.size(one.place, one.rank) - one.place.full for one in choice)
    whole = sum(place.full for place in places)
    assert 0.67 * whole <= whole + left <= 0.7 * whole
    kept = [float(costs[one.place][one.rank - 1] / costs[one.place][0]) for one in choice if one.rank > 1]
    gone = [float(costs[one.place][one.rank] / costs[one.place][0]) for one in choice]
    assert max(gone) <= min(kept)
    scaled = {place: 3.0 * saved for place, saved in costs.items()}
    assert by_threshold(places, scaled, form, 0.7) == choice


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 9), columns=st.integers(2, 16), count=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_more_rank_of_a_basis_never_costs_more_and_its_costs_are_those_of_its_factors(rows, columns, count, seed):
    generator = torch.Generator().manual_seed(seed)
    members = [
        Member(
            torch.randn(rows, columns, generator=generator, dtype=torch.float64),
            Metric((root(moment(rows, generator), 1e-3),), root(moment(columns, generator), 1e-3)),
        )
        for _ in range(count)
    ]
    found, whole = basis(lambda: members), sum(member.metric.cost(member.weight) for member in members)
    assert (found.costs >= 0).all()
    for rank in range(1, len(found.vectors) + 1):
        first = found.vectors[:rank]
        pairs = zip(members, seconds(lambda: members, first), strict=True)
        cost = sum(member.metric.cost(member.weight - second @ first) for member, second in pairs)
        assert cost == pytest.approx(float(found.costs[rank:].sum()), rel=1e-6, abs=FLOAT64 * whole)
    if count == 1:
        alone = spectrum(members[0].weight, members[0].metric).costs
        torch.testing.assert_close(found.costs, alone, rtol=1e-6, atol=FLOAT64 * whole)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "whisper", "t5"])
def test_a_basis_of_adjacent_layers_stands_once_and_is_written(name, tmp_path):
    inputs = FAMILIES[name].inputs()
    graph, report, _ = reduced(name, keep=0.6, share="layers", ranks="uniform", update=name == "llama")
    assert any("one first factor" in item.what for item in report.rewritten)
    firsts = [param for param in graph.params.values() if param.name.endswith(".down.weight")]
    assert any(len(param.users) == 1 + len(param.aliases) == 2 for param in firsts)
    emit(emission_of(graph, "auto"), graph.sources, tmp_path)
    model = load_model(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert distance(model(**inputs), run(graph, inputs)) < TOLERANCE
    if name == "llama":
        body = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
        for key, value in body.state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[f"model.{key}"])
