"""Sparse weights: exactly as many elements as asked for, errors in order, and the same numbers wherever they load."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from backends.safetensors import emit
from compiler import Recipe
from compiler.calibration.fidelity import Fidelity
from compiler.errors import PassError, TargetError
from compiler.evaluate import load_model
from compiler.frontend import capture
from compiler.ir.execute import read_param, run
from compiler.ledger import stored_params
from compiler.masked import fitted
from compiler.pipeline import Pipeline
from compiler.plan import bytes_in_file, make_plan
from compiler.target import emission_of
from compiler.weights.evaluate import evaluate
from compiler.weights.ops.sparse import as_scatter, unpacked
from passes import Heal
from passes.sparsify import Sparsify
from passes.sparsify.masks import largest, largest_by_row
from passes.sparsify.places import Pattern
from passes.sparsify.solve import Problem, _chosen, damped, solve, surgeon
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, distance
from tests.families import FAMILIES

FLOAT64 = 1e-9
ROOT = Path(__file__).parent.parent
METHODS = ["sparsegpt", "wanda", "magnitude"]


def batches(name, count=6, tokens=24):
    return [FAMILIES[name].inputs(batch=2, tokens=tokens, seed=seed) for seed in range(count)]


def sparse(name, directory=None, graph=None, **options):
    """A family's graph after the pass, the pass's report, and the distance from the original on calibration data."""
    graph, given = graph or graph_of(name), batches(name)
    before = Fidelity(graph, given)
    pipeline = Pipeline([Sparsify(**options)])
    (report,) = pipeline.run(graph, workdir=directory, calibration=lambda _: given).passes
    return graph, report, before.distance(graph)


def scattered(graph):
    """The sparse weights, the bits that are set in each, and its value as [.., rows, columns]."""
    for param in graph.params.values():
        expr = as_scatter(param.expr)
        if expr is not None:
            mask, value = evaluate([expr.args[0], expr], graph.sources)
            yield param, unpacked(mask, expr.attr("columns")), value


# --- one matrix ----------------------------------------------------------------------------------------------


def problem(rows, columns, seed, kind=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=kind)
    mixed = torch.randn(2 * columns, columns, generator=generator, dtype=kind)
    mixed = mixed @ torch.randn(columns, columns, generator=generator, dtype=kind) / columns**0.5
    costs = torch.rand(rows, generator=generator, dtype=kind) + 0.01
    return Problem(weight, damped(mixed.T @ mixed / len(mixed)), costs)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 12), groups=st.integers(1, 40), part=st.floats(0, 1), seed=st.integers(0, 2**16))
@pytest.mark.parametrize("method", METHODS)
def test_exactly_as_many_elements_remain_as_were_asked_for(method, rows, groups, part, seed):
    one = problem(rows, 4 * groups, seed)
    count = max(1, round(part * one.weight.numel()))
    for wanted in (count, Pattern(2, 4), Pattern(1, 2)):
        kept, found = solve(one, method, wanted)
        assert not found[~kept].any() and bool(found.isfinite().all())
        if isinstance(wanted, Pattern):
            assert (kept.unflatten(-1, (-1, wanted.of)).sum(-1) == wanted.kept).all()
        else:
            assert int(kept.sum()) == count
        if method != "sparsegpt":
            assert torch.equal(found[kept], one.weight[kept])


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 12), groups=st.integers(1, 40), part=st.floats(0.05, 1), seed=st.integers(0, 2**16))
def test_sparsegpt_costs_no_more_than_wanda_and_fitting_never_more(rows, groups, part, seed):
    one = problem(rows, 4 * groups, seed)
    for wanted in (max(1, round(part * one.weight.numel())), Pattern(2, 4)):
        kept, plain = solve(one, "wanda", wanted)
        allowed = one.cost(plain) + FLOAT64 * one.cost(0 * plain)
        assert one.cost(surgeon(one, wanted)[1]) <= allowed
        assert one.cost(fitted(one.weight, one.second, kept, plain)) <= allowed


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(4, 12), groups=st.integers(4, 40), seed=st.integers(0, 2**16))
@pytest.mark.parametrize("method", METHODS)
def test_more_kept_never_costs_more_in_what_the_method_minimises(method, rows, groups, seed):
    one = problem(rows, 4 * groups, seed)
    metric = {
        "sparsegpt": one.second,
        "wanda": one.second.diagonal().diag(),
        "magnitude": torch.eye(4 * groups, dtype=torch.float64),
    }[method]
    alike = one.rows if method == "sparsegpt" else torch.ones_like(one.rows)
    judge = Problem(one.weight, metric, alike)
    whole = one.weight.numel()
    costs = [judge.cost(solve(one, method, round(whole * eighths / 8))[1]) for eighths in range(1, 9)]
    assert all(after <= before + FLOAT64 * costs[0] for before, after in pairwise(costs))
    assert costs[-1] <= FLOAT64 * costs[0]
    patterns = [judge.cost(solve(one, method, Pattern(kept, 4))[1]) for kept in (1, 2, 3)]
    assert all(after <= before + FLOAT64 * costs[0] for before, after in pairwise(patterns))


def test_a_choice_that_costs_more_with_more_kept_is_grown_instead():
    """Here three eighths chosen column by column cost more than two."""
    one = problem(4, 28, 3339)
    two, three = (one.cost(surgeon(one, eighths * 14)[1]) for eighths in (2, 3))
    assert three < two < one.cost(_chosen(one, 3 * 14)[1])


def test_masks_take_the_largest():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 6.0, 5.0]])
    assert largest(scores, 4).tolist() == [[False] * 4, [True] * 4]
    assert largest_by_row(scores, 5).tolist() == [[True, False, True, False], [True, True, True, False]]
    assert largest(scores, Pattern(1, 2)).tolist() == [[True, False, True, False], [True, False, True, False]]


def test_inputs_that_are_no_numbers_are_an_error_and_unseen_ones_are_not():
    assert torch.equal(damped(torch.zeros(3, 3)), torch.eye(3))
    with pytest.raises(PassError, match="no finite numbers"):
        surgeon(Problem(torch.ones(2, 2), torch.full((2, 2), torch.nan), torch.ones(2)), 2)


# --- the pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"keep": 0.3}),
        ("mixtral", {"keep": 0.5}),
        ("gpt2", {"keep": 0.5, "method": "wanda"}),
        ("vit", {"pattern": "4:8"}),
        ("whisper", {"pattern": "2:4", "method": "magnitude"}),
    ],
)
def test_the_plan_has_the_types_of_the_run_and_every_matrix_keeps_what_it_should(name, options):
    graph, report, _ = sparse(name, **options)
    planned = plan_of(name)
    (plan,) = Pipeline([Sparsify(**options)]).run(planned, planned=True, calibration=lambda _: []).passes
    assert {p.name: _types(p.expr) for p in planned.params.values()} == {
        p.name: _types(p.expr) for p in graph.params.values()
    }
    assert [(one.scope, one.what) for one in plan.rewritten] == [(one.scope, one.what) for one in report.rewritten]
    found = list(scattered(graph))
    assert {param.name for param, _, _ in found} == {one.scope for one in report.rewritten}
    for param, kept, value in found:
        assert not value[~kept].any()
        matrices = kept.flatten(0, -3) if kept.ndim > 2 else kept[None]
        if "pattern" in options:
            few, many = map(int, options["pattern"].split(":"))
            assert (kept.unflatten(-1, (-1, many)).sum(-1) == few).all()
        else:
            assert (matrices.sum((-2, -1)) == round(options["keep"] * matrices[0].numel())).all()
        assert read_param(graph, param).count_nonzero() <= kept.sum()


def _types(expr):
    return (expr.type, [arg.type for arg in expr.args], [_types(arg) for arg in expr.args if arg.op == "scatter"])


def test_each_method_is_nearer_to_the_original_than_the_one_before():
    distances = [sparse("llama", keep=0.5, method=method)[2] for method in reversed(METHODS)]
    assert distances == sorted(distances, reverse=True)


def test_sizes_by_layer_keep_as_much_and_are_taken_only_if_nearer():
    graph, report, distance = sparse("llama", keep=0.5, sizes="by-layer")
    even, shared = report.trials
    assert shared.chosen == (shared.distance < even.distance) and even.chosen != shared.chosen
    assert sum(one.numbers["kept"] for one in report.rewritten) <= 0.5 * sum(
        one.numbers["elements"] for one in report.rewritten
    )
    assert distance >= 0 and {one.scope for one in report.rewritten} == {param.name for param, _, _ in scattered(graph)}


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path):
    found = []
    for directory in (tmp_path / "a", tmp_path / "b", tmp_path / "b"):
        graph, _, _ = sparse("llama", directory, keep=0.5)
        found.append({param.name: param.expr.key for param in graph.params.values()})
        for bundle in list((directory / "progress-0").glob("*"))[::2]:
            bundle.unlink()
    assert found[0] == found[1] == found[2]


def test_impossible_wishes_are_errors_and_what_stays_is_said():
    for options, reason in [
        ({"pattern": "4:2"}, "is no pattern"),
        ({"pattern": "half"}, "is no pattern"),
        ({"pattern": "2:4", "keep": 0.5}, "says what remains of every matrix"),
        ({"pattern": "2:4", "sizes": "by-layer"}, "says what remains of every matrix"),
    ]:
        with pytest.raises(PassError, match=reason):
            Sparsify(**options)
    graph = plan_of("llama")
    with pytest.raises(PassError, match="none of the selected weights"):
        Pipeline([Sparsify(where="mlp", pattern="3:7")]).run(graph, planned=True)
    graph = plan_of("gpt2")
    (entry,) = Pipeline([Sparsify(where="linear", keep=0.5)]).run(graph, planned=True, calibration=lambda _: []).passes
    assert "it is read by embedding as well" in {skip.reason for skip in entry.skipped}


@pytest.mark.parametrize("tokens", [{"layer_tokens": 512, "tokens": 0}, {"layer_tokens": 0, "tokens": 512}])
def test_healing_trains_what_remains_and_nothing_else(tokens):
    graph, given = graph_of("llama"), batches("llama", 20)
    steps = [Sparsify(keep=0.4, method="magnitude"), Heal(**tokens)]
    report = Pipeline(steps).run(graph, calibration=lambda _: given).passes
    assert report[1].trials[1].chosen
    found = list(scattered(graph))
    assert {param.name for param, _, _ in found} == {one.scope for one in report[0].rewritten}
    for _, kept, value in found:
        assert not value[~kept].any() and int(kept.sum()) == round(0.4 * kept.numel())
        assert value.count_nonzero() <= kept.sum()


# --- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "bert", "vit", "whisper", "t5"])
def test_the_class_of_the_source_loads_the_zeros_and_computes_the_same(name, tmp_path):
    graph = graph_of(name)
    Pipeline([Sparsify(keep=0.5, method="magnitude")]).run(graph)
    emission = emission_of(graph, "stock")
    assert emission.architecture == FAMILIES[name].architecture or not emission.files
    emit(emission, graph.sources, tmp_path)
    inputs = FAMILIES[name].inputs()
    with torch.no_grad():
        found = load_model(tmp_path)(**inputs)
    assert distance(found, run(graph, inputs)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        ("llama", {"keep": 0.5}, torch.bfloat16),
        ("phi3", {"pattern": "2:4"}, torch.float16),
        ("mixtral", {"keep": 0.3}, torch.float32),
        ("vit", {"pattern": "1:4"}, torch.float32),
        ("t5", {"keep": 0.5}, torch.float32),
    ],
)
def test_bits_and_values_are_smaller_and_load_to_the_last_bit_and_are_saved_again(name, options, dtype, tmp_path):
    family = FAMILIES[name]
    family.build().to(dtype).save_pretrained(tmp_path / "source")
    graph = capture(tmp_path / "source")
    Pipeline([Sparsify(**options, method="magnitude")]).run(graph)
    written, nbytes = {}, {}
    for way in (False, True):
        emission = emission_of(graph, "generated", compact=way)
        written[way] = tmp_path / str(way)
        written[way].mkdir()
        emit(emission, graph.sources, written[way])
        nbytes[way] = emission.nbytes
    count = bytes_in_file(compact=True)
    assert sum(count(param) for param in stored_params(graph)) == nbytes[True] < nbytes[False]
    dense, packed = (load_model(written[way], trust_remote_code=True) for way in (False, True))
    packed.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", trust_remote_code=True)
    assert any(key.endswith("_mask") for key in _keys(tmp_path / "again"))
    for command in (["check"], ["format", "--check"]):
        ruff = [Path(sys.executable).with_name("ruff"), *command, "-q", "--config", ROOT / "pyproject.toml"]
        assert not subprocess.run([*ruff, *written[True].glob("*.py")], check=False).returncode
    for key, tensor in dense.state_dict().items():
        assert torch.equal(packed.state_dict()[key], tensor) and torch.equal(again.state_dict()[key], tensor), key
    inputs = family.inputs()
    with torch.no_grad():
        assert distance(packed(**inputs), run(graph, inputs)) < TOLERANCE


def _keys(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_the_plan_knows_the_bytes_of_bits_and_values_and_says_when_there_are_none(tmp_path):
    FAMILIES["llama"].build().save_pretrained(tmp_path / "source")
    sizes = {}
    for way in ("zeros", "compact"):
        step = "sparsify: {pattern: '2:4', method: magnitude}"
        text = f"model: source\npasses: [{step}]\nemit: [safetensors: {{sparse: {way}}}]"
        (tmp_path / "recipe.yaml").write_text(text)
        plan = make_plan(Recipe.load(tmp_path / "recipe.yaml"))
        sizes[way] = plan.output.tensor_bytes
        assert plan.report.after.stored_bytes == plan.output.tensor_bytes
        assert any("save nothing" in line for line in plan.output.loads_in) == (way == "zeros")
    assert sizes["compact"] < 0.75 * sizes["zeros"]
    graph = plan_of("llama")
    with pytest.raises(TargetError, match="no weight is so sparse"):
        emission_of(graph, compact=True)
