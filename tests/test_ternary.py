"""Codes -1, 0 and 1: the best scale of all, and every reader of integers of two bits reads what is written."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from compiler.errors import PassError
from compiler.ir.execute import run
from compiler.pipeline import Pipeline
from compiler.weights.evaluate import evaluate
from compiler.weights.ops import take
from compiler.weights.ops.ternary import Ternary
from passes import Quantize
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, Job
from tests.families import FAMILIES
from tests.test_codecs import FLOATS, by_group, matrix
from tests.test_generated import error, tolerance, written
from tests.test_packing import bound

EVERY = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=5)))


@given(
    values=st.lists(st.floats(-8, 8, width=16), min_size=5, max_size=5),
    weights=st.lists(st.floats(0.125, 4, width=16), min_size=5, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_no_other_codes_and_scale_are_nearer(values: list[float], weights: list[float]):
    """With weights for errors or without: of all 243 codes, each with its own best scale."""
    group = torch.tensor([values])
    for counted in (None, torch.tensor([weights])):
        codec = Ternary(2, 0, torch.float32)
        parameters = codec.fit(group, counted)
        found = codec.decode(codec.encode(group, parameters), parameters)
        own = torch.ones(5) if counted is None else counted[0]
        scale = (EVERY * own * group).sum(1) / (EVERY.square() * own).sum(1).clamp(min=1e-9)
        best = ((scale[:, None] * EVERY - group).square() * own).sum(1).min()
        assert float(((found - group).square() * own).sum()) <= float(best) + 1e-4


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [0, 16])
def test_columns_by_themselves_and_ranges_of_rows_are_those_of_the_whole(group, dtype):
    weight = matrix(dtype)
    codec = Ternary(2, group, dtype)
    (expr,), sources = bound(w=weight)
    whole = codec.nearest(expr)
    for ours, theirs in zip(by_group(codec, weight), evaluate(list(whole.args), sources), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    values, part = evaluate([whole, take(whole, 0, 5, 9)], sources)
    assert torch.equal(values[5:9], part)
    assert set(evaluate([whole.args[0]], sources)[0].unique().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("dtype", FLOATS)
def test_three_values_are_exact(dtype):
    weight = (matrix(dtype).sign() * (matrix(dtype, seed=1) > 0) * torch.exp2(torch.arange(24.0) - 9)[:, None]).to(
        dtype
    )
    (expr,), sources = bound(w=weight)
    assert torch.equal(evaluate([Ternary(2, 16, dtype).nearest(expr)], sources)[0], weight)


@pytest.mark.parametrize("method", ["nearest", "gptq", "refined"])
def test_stock_transformers_loads_them_as_integers_of_two_bits(method, tmp_path):
    windows = [FAMILIES["llama"].inputs(batch=2, tokens=24, seed=seed) for seed in range(2)]
    job = Job("llama", tmp_path, [Quantize(type="ternary", group=16, method=method)], calibration=lambda _: windows)
    job.emit()
    assert job.reload_error() <= TOLERANCE
    assert any(name.endswith("weight_packed") for name in load_file(job.out / "model.safetensors"))
    assert all("ternary, groups of 16" in entry.what for entry in job.report.passes[0].rewritten)


def test_choosing_by_what_enters_never_costs_more():
    windows = [FAMILIES["llama"].inputs(batch=2, tokens=24, seed=seed) for seed in range(2)]
    errors = {}
    for method, scale in (("nearest", "weighted"), ("gptq", "search")):
        graph = graph_of("llama")
        step = Quantize(where="mlp.gate", skip=("*.1.*",), type="ternary", method=method, scale=scale)
        (report,) = Pipeline([step]).run(graph, calibration=lambda _: windows).passes
        errors[method] = report.rewritten[0].numbers["relative_error"]
    assert errors["gptq"] <= errors["nearest"]


def test_generated_code_holds_them_packed(tmp_path):
    graph = graph_of("gemma2")
    Pipeline([Quantize(type="ternary", tied="share")]).run(graph)
    model, given_inputs = written(graph, tmp_path / "out"), FAMILIES["gemma2"].inputs()
    with torch.no_grad():
        assert error(model(**given_inputs).logits, run(graph, given_inputs)["logits"]) <= tolerance(graph)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "ternary has 2 bits"),
        ({"symmetric": False}, "ternary has no zero points"),
        ({"scale": "minmax"}, "what codes of ternary stand for is fitted"),
        ({"scale": "robust"}, "for integers, not for ternary"),
        ({"learn": "rounding"}, "codes of ternary are not learned"),
        ({"group": "search"}, "groups of ternary are not searched for"),
        ({"bits": 2.5}, "ternary has one width"),
    ],
)
def test_options_that_ternary_codes_do_not_have(options, message):
    with pytest.raises(PassError, match=message):
        Pipeline([Quantize(type="ternary", **options)]).run(plan_of("llama"))
