"""Bits shared out by what they are predicted to cost: within the budget, and never for the worse."""

from __future__ import annotations

import pytest
import torch

from compiler.calibration.fidelity import Fidelity
from compiler.calibration.moments import measure
from compiler.calibration.products import products
from compiler.errors import PassError
from compiler.pipeline import Pipeline
from compiler.weights.expr import loads
from compiler.weights.ops.codec import is_quantised
from compiler.weights.spill import Progress
from passes.quantize import Quantize
from passes.quantize.experts import bits_of, matrices
from passes.quantize.mixed import EVEN, SPREAD, Data, column_costs, evenly, together
from passes.quantize.solve import damped, inverse_factor
from tests.captures import graph_of
from tests.test_quantize_calibrated import METHODS, quantised
from tests.test_sparsify import batches


@pytest.mark.parametrize("bits", [2.5, 3.3, 5.1])
def test_shared_out_within_the_budget_and_alike_where_runtimes_fuse(bits):
    graph, report, _ = quantised("llama", bits=bits, group=16, method="gptq")
    own = {param: param.expr.attr("bits") for param in graph.params.values() if param.expr.op == "dequantize"}
    assert sum(size * param.type.numel for param, size in own.items()) <= bits * sum(param.type.numel for param in own)
    assert len(set(own.values())) > 1 and report.curves
    by_input = {}
    for param, size in own.items():
        by_input.setdefault(products(graph)[param][0].input(0), set()).add(size)
    assert all(len(sizes) == 1 for sizes in by_input.values())


@pytest.mark.parametrize("method", ["nearest", *METHODS])
@pytest.mark.parametrize(("bits", "widths", "plain"), [(3, (2, 3, 4), EVEN), (2.5, (), SPREAD)])
def test_shared_out_is_no_further_than_without_a_prediction(bits, widths, plain, method):
    """On windows that are held out, from weights that are solved on the others."""
    _, report, _ = quantised("llama", bits=bits, widths=widths, group=16, method=method)
    distances = {trial.what: trial.distance for trial in report.trials}
    (chosen,) = (trial.distance for trial in report.trials if trial.chosen)
    assert chosen == min(distances.values()) and plain in distances and len(distances) > 1
    if plain == EVEN:
        data, graph = Data.of(batches("llama")), graph_of("llama")
        quick = "gptq" if method == "refined" else method
        Pipeline([Quantize(bits=bits, group=16, method=quick)]).run(graph, calibration=lambda _: data.rest)
        assert chosen <= Fidelity(graph_of("llama"), data.held).distance(graph) * (1 + 1e-3)


def test_what_columns_make_up_for_counts_less_on_inputs_that_they_were_not_fitted_to():
    """The costs of columns are those of what `in_order` does, on other vectors, whatever it rounds."""
    graph = graph_of("llama")
    param = next(param for param in products(graph) if "down_proj" in param.name)
    data = Data.of(batches("llama"))
    rest, held = (measure(graph, [param], part, Progress()).of(param) for part in (data.rest, data.held))
    factor = inverse_factor(damped(rest.second))
    own = torch.randn(4096, len(factor), generator=torch.Generator().manual_seed(0)) / factor.diagonal()
    error = own @ factor
    for other, moments in ((rest, rest), (held, held)):
        (counts,) = column_costs(param, rest, other)
        met = ((error @ moments.second.float()) * error).sum(1).mean()
        assert float((own * factor.diagonal()).square().mean(0) @ counts) == pytest.approx(float(met), rel=0.1)


@pytest.mark.parametrize(("bits", "widths"), [(2.25, (2, 4)), (3.9, (2, 3, 8))])
def test_a_plan_knows_the_size_before_anything_is_measured(bits, widths):
    graph = graph_of("llama")
    params = list(products(graph))
    groups = together(graph, params)
    own = bits_of(evenly([matrices(group, apart=False)[0] for group in groups], bits, widths))
    assert all(len({own[param] for param in group}) == 1 for group in groups)
    total = sum(param.type.numel for param in params)
    used = sum(size * param.type.numel for param, size in own.items())
    largest = max(sum(param.type.numel for param in group) for group in groups)
    assert bits * total - (max(widths) - min(widths)) * largest <= used <= bits * total


@pytest.mark.parametrize("options", [{"method": "refined"}, {"bits": 3.5, "group": 16}], ids=str)
def test_what_the_first_output_does_not_depend_on_is_not_taken_for_free(options):
    graph, report, _ = quantised("siglip_text", **{"bits": 4, **options})
    head = graph.params["head.weight"]
    if "method" in options:
        assert head.expr.attr("bits") == 4
    else:
        assert head.expr.attr("bits") == 3 and all("head.weight" not in curve.scope for curve in report.curves)


def test_a_whole_number_that_is_no_width_is_an_average():
    graph, _, _ = quantised("llama", bits=3, widths=(2, 4))
    assert {param.expr.attr("bits") for param in graph.params.values() if is_quantised(param.expr)} == {2, 4}


def test_trials_give_back_what_they_took(tmp_path):
    """A run keeps what its result reads, and of each trial how far it was; one that goes on comes to the same."""
    options = {"bits": 3.5, "group": 16, "method": "gptq", "where": "mlp"}
    graph, report, _ = quantised("llama", tmp_path, **options)
    read = {load.attr("key") for param in graph.params.values() for load in loads([param.expr])}
    spilt = {file.stem for file in (tmp_path / "spill").iterdir()}
    assert spilt and spilt <= read
    solved = [file.name for file in (tmp_path / "progress-0").glob("solved-*")]
    assert len(solved) == sum(is_quantised(param.expr) for param in graph.params.values())
    trials = {trial.what: trial.distance for trial in report.trials}
    assert len(list((tmp_path / "progress-0").glob("trial-*"))) == len(trials)
    again, second, _ = quantised("llama", tmp_path, **options)
    assert {trial.what: trial.distance for trial in second.trials} == trials
    assert {name: p.expr.key for name, p in again.params.items()} == {n: p.expr.key for n, p in graph.params.items()}


def test_experts_alone_and_tables_alone():
    for name, where in (("mixtral", "experts"), ("qwen3", "embedding")):
        for options in ({"method": "refined", "bits": 4}, {"bits": 3.5}):
            _, report, _ = quantised(name, where=where, tied="copy", **options)
            assert report.rewritten


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3.5, "widths": (4, 8)}, "no widths out of 4, 8 are 3.5 bits on average"),
        ({"bits": 3.5, "type": "nvfp4"}, "nvfp4 has one width"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_out(options, message):
    with pytest.raises(PassError, match=message):
        quantised("llama", **options)
