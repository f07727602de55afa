"""Quantisation by what enters: errors that only shrink, and the same numbers wherever they load."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.calibration.backward import backwards, drawn
from compiler.calibration.energies import energies
from compiler.calibration.fidelity import Fidelity
from compiler.calibration.products import products
from compiler.calibration.sequence import in_order
from compiler.errors import PassError
from compiler.ir.execute import read_param, run
from compiler.ir.layers import copy_of
from compiler.pipeline import Pipeline
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import load
from compiler.weights.ops.integer import Integer
from compiler.weights.ops.mx import Mx
from compiler.weights.ops.nvfp4 import Nvfp4
from compiler.weights.spill import Progress, SpillSource
from passes.quantize import Quantize, reduce
from passes.quantize.solve import DAMPINGS, Problem, chosen_damping, damped, inverse_factor, nearest, refined, solve
from passes.quantize.solve import in_order as column_by_column
from tests.captures import graph_of
from tests.emitted import TOLERANCE, Job
from tests.test_sparsify import batches

CODECS = {
    "int2": Integer(2, 32, torch.float32),
    "int3, zero points": Integer(3, 16, torch.bfloat16, symmetric=False),
    "int4 a row": Integer(4, 0, torch.float32),
    "int3, not searched": Integer(3, 32, torch.float32, search=False),
    "mxfp4": Mx(torch.float32),
    "nvfp4": Nvfp4(torch.bfloat16),
}
METHODS = ["gptq", "refined"]


def problem(rows, columns, seed, correlated=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    vectors = torch.randn(2 * columns, columns, generator=generator)
    if correlated:
        vectors = vectors @ torch.randn(columns, columns, generator=generator) / columns**0.5
    return Problem(weight, damped((vectors.T @ vectors / len(vectors)).double()))


@settings(max_examples=4, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 5), seed=st.integers(0, 2**16))
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_each_step_costs_no_more_than_the_one_before(codec, rows, groups, seed):
    one = problem(rows, 32 * groups, seed)
    own = codec.for_matrix(one.wanted)
    plain = [nearest(one, own, weighted=weighted) for weighted in (True, False)]
    first = column_by_column(one, own)
    second = refined(one, own, first)
    assert one.cost(second.values) <= one.cost(first.values)
    costs = [one.cost(solve(one, own, refine=refine).values) for refine in (False, True)]
    assert costs[1] <= costs[0] <= min(one.cost(each.values) for each in plain)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_columns_make_up_for_one_another(codec):
    """On correlated inputs, by a wide margin: a third of the error of rounding to nearest is gone."""
    one = problem(64, 128, 3)
    own = codec.for_matrix(one.wanted)
    best = min(one.cost(nearest(one, own, weighted=weighted).values) for weighted in (True, False))
    assert one.cost(solve(one, own, refine=True).values) < best * 2 / 3


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("refine", [False, True])
def test_what_is_stored_is_what_was_solved(codec, refine):
    one = problem(8, 96, 5)
    own = codec.for_matrix(one.wanted)
    found = solve(one, own, refine=refine)
    spill = SpillSource()
    keys = [spill.add(f"part{index}", part) for index, part in enumerate(own.stored(found.codes, found.parameters))]
    expr = own.expression([load("spill", key, spill.types[key]) for key in keys])
    assert torch.equal(evaluate([expr], {"spill": spill})[0].float(), found.values)


def test_inputs_that_have_nothing_to_do_with_each_other_leave_rounding_as_it_is():
    one = Problem(torch.randn(8, 64, generator=torch.Generator().manual_seed(1)), torch.eye(64))
    codec = Integer(4, 16, torch.float32)
    assert torch.equal(column_by_column(one, codec).values, nearest(one, codec, weighted=False).values)


@pytest.mark.parametrize("correlated", [False, True])
def test_rounding_to_nearest_is_not_missed_where_it_comes_near(correlated):
    """It is tried on some of many rows, and on all where inputs have little to do with each other."""
    one, codec = problem(200, 64, 6, correlated), Integer(3, 16, torch.float32)
    best = min(one.cost(nearest(one, codec, weighted=weighted).values) for weighted in (True, False))
    assert one.cost(solve(one, codec, refine=False).values) <= best


def test_the_factor_is_that_of_the_inverse():
    second = problem(1, 96, 8).second
    factor = inverse_factor(second)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ second @ factor.T, torch.eye(96), rtol=0, atol=1e-3)


@pytest.mark.parametrize("refine", [False, True])
def test_numbers_of_the_grid_stay(refine):
    codes = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(2)).float()
    codes[:, ::16] = -8.0  # so that every group shows its scale
    one = Problem(codes / 16, problem(1, 64, 4).second)
    assert torch.equal(solve(one, Integer(4, 16, torch.float32), refine=refine).values, codes / 16)


def test_moments_that_are_no_numbers():
    with pytest.raises(PassError, match="no finite numbers"):
        column_by_column(Problem(torch.ones(2, 32), torch.full((32, 32), float("nan"))), Integer(4, 0, torch.float32))


# --- on models -----------------------------------------------------------------------------------------------


def quantised(name, directory=None, **options):
    """A family's graph after the pass, the pass's report, and the distance from the original on calibration data."""
    graph, given_batches = graph_of(name), batches(name)
    before = Fidelity(graph, given_batches)
    pipeline = Pipeline([Quantize(**options)])
    (report,) = pipeline.run(graph, workdir=directory, calibration=lambda _: given_batches).passes
    return graph, report, before.distance(graph)


@pytest.mark.parametrize("name", ["llama", "vit", "mixtral", "t5"])
def test_calibrated_is_nearer_to_the_original(name):
    plain, *better = (quantised(name, bits=3, group=16, method=method)[2] for method in ("nearest", *METHODS))
    assert max(better) < plain


@pytest.mark.parametrize(
    ("method", "options"), [("gptq", {"bits": 3, "symmetric": False}), ("refined", {"bits": 4, "group": 16})]
)
def test_transformers_computes_with_what_was_written(method, options, tmp_path):
    given_batches = batches("llama")
    job = Job("llama", tmp_path, [Quantize(method=method, **options)], calibration=lambda _: given_batches)
    emission = job.emit()
    assert job.reload_error() <= TOLERANCE
    assert emission.quantization_config["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("method", METHODS)
def test_the_same_again_and_after_a_stop(method, tmp_path):
    first, _, _ = quantised("llama", tmp_path / "a", bits=3, method=method)
    again, _, _ = quantised("llama", tmp_path / "a", bits=3, method=method)
    other, _, _ = quantised("llama", tmp_path / "b", bits=3, method=method)
    for param, twin, third in zip(*(graph.params.values() for graph in (first, again, other)), strict=True):
        assert param.expr.key == twin.expr.key == third.expr.key


class Stop(Exception):
    """Raised where a run is to be interrupted."""


@pytest.mark.parametrize(
    ("options", "problems", "first", "stop"),
    [({"method": "refined"}, 9, 4, 5), ({"type": "nvfp4", "method": "gptq"}, 15, 7, 9)],
    ids=["joined", "apart"],
)
def test_an_interrupted_run_solves_only_what_is_left(options, problems, first, stop, tmp_path, monkeypatch):
    """Queries, keys and values, which are measured together, are solved together again.

    There are ``problems``, ``first`` of them in the first layer; the run stops at number ``stop``, in the second one.
    """
    wanted, _, _ = quantised("llama", **options)
    solved = 0

    def counting(*given, **how):
        nonlocal solved
        solved += 1
        if solved == stop:
            raise Stop
        return solve(*given, **how)

    monkeypatch.setattr(reduce, "solve", counting)
    with pytest.raises(Stop):
        quantised("llama", tmp_path, **options)
    found, _, _ = quantised("llama", tmp_path, **options)
    assert solved == stop + problems - first
    assert [param.expr.key for param in found.params.values()] == [param.expr.key for param in wanted.params.values()]


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_rows_that_have_nothing_in_common_are_solved_together_as_apart(codec):
    one = problem(12, 64, 11)
    parts = [Problem(wanted, one.second) for wanted in one.wanted.split([5, 7])]
    own = codec.for_matrix(one.wanted)
    together, *apart = (column_by_column(each, own).values for each in (one, *parts))
    assert (together == torch.cat(apart)).float().mean() > 0.99  # but for ties that the order of sums decides


def test_a_plan_has_the_types_of_the_run():
    for options in ({"bits": 3, "group": 16, "method": "refined"}, {"type": "nvfp4", "method": "gptq"}):
        graph, _, _ = quantised("llama", **options)
        planned = graph_of("llama")
        Pipeline([Quantize(**options)]).run(planned, planned=True, calibration=lambda _: [])
        for param, twin in zip(graph.params.values(), planned.params.values(), strict=True):
            assert param.expr.attrs == twin.expr.attrs
            assert (param.expr.type, [arg.type for arg in param.expr.args]) == (
                twin.expr.type,
                [arg.type for arg in twin.expr.args],
            )


def test_damping_is_searched_for_on_windows_that_are_held_out():
    """The one that is taken costs least there, and what is solved is solved with it."""
    one, other = problem(24, 64, 3), problem(24, 64, 3)
    codec, aside = CODECS["int4 a row"], Problem(one.wanted, damped(other.second.double(), 0.0))
    torch.testing.assert_close(aside.second, other.second.float(), rtol=1e-6, atol=0.0)
    found = chosen_damping(one.wanted, one.second.double(), other.second.double(), codec)
    costs = {
        each: aside.cost(column_by_column(Problem(one.wanted, damped(one.second.double(), each)), codec).values)
        for each in DAMPINGS
    }
    assert costs[found] == min(costs.values()) < max(costs.values())
    _, report, _ = quantised("llama", method="gptq", bits=3, damping="search")
    chosen = [entry.numbers["damping"] for entry in report.rewritten]
    assert len(chosen) == 15 and set(chosen) <= set(DAMPINGS)
    _, report, _ = quantised("llama", method="gptq", bits=3, damping=0.05)
    assert all("damping" not in entry.numbers for entry in report.rewritten)


def test_moments_in_two_parts_make_up_the_whole():
    graph, given_batches = graph_of("mixtral"), batches("mixtral")
    params = [param for param in products(graph) if param.type.rank == 3]
    for held in (False, True):
        mets = list(in_order(graph, copy_of(graph), params, given_batches, held=held))
        if not held:
            wholes = [met.moments for met in mets]
            continue
        for met, whole in zip(mets, wholes, strict=True):
            rest, aside = met.parts
            assert torch.equal(rest.count + aside.count, whole.count) and (aside.count > 0).any()
            for part in ("mean", "second"):
                torch.testing.assert_close(getattr(met.moments, part), getattr(whole, part), rtol=1e-4, atol=1e-6)


# --- how much vectors count ------------------------------------------------------------------------------------


def test_energies_are_those_of_gradients():
    """Of a head, whose gradient at the logits is known: chances less the label that was drawn."""
    graph, given_batches = graph_of("llama"), batches("llama", count=2)
    head = next(param for param, nodes in products(graph).items() if nodes[0] is graph.outputs["logits"].node)
    found = energies(graph, {head: products(graph)[head][0]}, given_batches, Progress(), seed=3)

    class Labels:
        forward, samples = True, 1

        def see(self, value, tensor):
            pass

        def done(self):
            pass

    source = torch.Generator().manual_seed(3)
    expected = []
    for batch in given_batches:
        chances = run(graph, batch)["logits"].softmax(-1).flatten(0, -2)
        label = drawn(chances, source)
        expected.append((chances - torch.zeros_like(chances).scatter(1, label, 1.0)).square().sum(-1))
    relative = torch.cat(expected) / torch.cat(expected).mean()
    wanted = relative.sqrt() / relative.sqrt().mean()
    counts = torch.cat(found.counts([head]))
    assert torch.allclose(counts, wanted, rtol=2e-2, atol=1e-3)
    assert backwards(graph, given_batches, 3, Labels()) == len(counts)


def test_labels_are_drawn_as_often_as_they_are_likely():
    chances = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    labels = drawn(chances.expand(20_000, -1), torch.Generator().manual_seed(0))
    often = labels.flatten().bincount(minlength=len(chances)) / len(labels)
    spread = (chances * (1 - chances) / len(labels)).sqrt()
    assert ((often - chances).abs() <= 4 * spread).all()


def test_weights_meet_what_those_before_them_have_become():
    """And F takes it back to what the original meets: with nothing rewritten it is the identity."""
    graph, given_batches = graph_of("llama"), batches("llama")
    trial = copy_of(graph)
    params = [param for param in products(graph) if param.type.rank == 2]
    seen = []
    for met in in_order(graph, trial, params, given_batches, paired=True):
        seen.extend(met.params)
        assert torch.allclose(met.fit, torch.eye(len(met.fit), dtype=torch.float64), atol=1e-4)
    position = {node: index for index, node in enumerate(graph.nodes)}
    assert seen == sorted(params, key=lambda param: position[products(graph)[param][0]])


@pytest.mark.parametrize("count", [1, 2, 16])
def test_what_takes_inputs_back_does_so_on_other_data(count):
    """However little it is fitted on; of one batch, which cannot be held out as well, nothing is concluded."""
    graph, trial = graph_of("llama"), copy_of(graph_of("llama"))
    param = next(param for param in products(graph) if "down_proj" in param.name)
    gate = trial.params[param.name.replace("down", "gate")]
    noise = torch.randn(gate.type.static_shape, generator=torch.Generator().manual_seed(4))
    noisy = read_param(graph, graph.params[gate.name]) + noise * 0.05
    spill = trial.sources["spill"] = SpillSource()
    key = spill.add("noisy", noisy)
    gate.expr = load("spill", key, spill.types[key])
    given_batches = batches("llama", count=count + 8, tokens=4)
    (met,) = in_order(graph, trial, [param], given_batches[8:], paired=True)
    lost = [0.0, 0.0]
    for batch in given_batches[:8]:
        x, y = (entering_at(each, products(each)[each.params[param.name]][0], batch) for each in (graph, trial))
        for index, taken in enumerate((y, y @ met.fit.T)):
            lost[index] += float((x - taken).square().sum())
    assert lost[0] > 0
    assert lost[1] == lost[0] if count == 1 else lost[1] < lost[0]


def entering_at(graph, node, batch):
    """What enters ``node``: float64 [vectors, width]."""
    seen = {}
    run(graph, batch, observe=lambda value, tensor: seen.update({value: tensor}))
    return seen[node.input(0)].double().flatten(0, -2)


def test_gradients_pass_rounded_activations():
    graph, rounded = graph_of("llama"), graph_of("llama")
    passes = [Quantize(where="attention.output", activations="int8", activation_scale="static")]
    Pipeline(passes).run(rounded, calibration=lambda _: batches("llama"))
    counts = []
    for each in (graph, rounded):
        nodes = _one(each, next(param.name for param in products(graph) if "v_proj" in param.name))
        counts.append(torch.cat(energies(each, nodes, batches("llama"), Progress()).counts(list(nodes))))
    assert torch.corrcoef(torch.stack(counts))[0, 1] > 0.95


def _one(graph, name):
    param = graph.params[name]
    return {param: products(graph)[param][0]}
