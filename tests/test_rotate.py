"""Rotations of heads, streams and what MLPs read; tests of equivariance hold that they change nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given as draw
from hypothesis import settings
from hypothesis import strategies as st

from backends.safetensors import emit
from compiler.errors import PassError
from compiler.evaluate import load_model
from compiler.ir.execute import run
from compiler.ir.ops.hadamard import basis, transform
from compiler.ir.roles import roles
from compiler.pipeline import Pipeline
from compiler.target import emission_of
from passes import LowRank, Rotate
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, Job, distance
from tests.families import FAMILIES
from tests.graphs import tiny_llama
from tests.removed import value
from tests.test_onnx import written


@settings(max_examples=20, deadline=None)
@draw(st.integers(1, 120))
def test_the_transform_is_orthogonal_for_every_width(size):
    matrix = basis(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(transform(x), x @ matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [64, 96])
def test_what_stands_out_is_spread(size):
    spike = torch.zeros(size, dtype=torch.float64)
    spike[5] = 1.0
    assert transform(spike).abs().max() <= 2 / size**0.5


def test_the_weights_of_every_head_are_turned():
    graph, before = tiny_llama(layers=1), tiny_llama(layers=1)
    Pipeline([Rotate(what="values")]).run(graph)
    name = next(name for name in graph.params if name.endswith("v_proj.weight"))
    old, new = value(before, before.params[name]).double(), value(graph, graph.params[name])
    turned = basis(4).T @ old.reshape(-1, 4, old.shape[1])
    torch.testing.assert_close(new, turned.reshape(old.shape), rtol=0, atol=1e-12)


def test_a_stream_that_cannot_be_rotated_says_why_and_alone_is_an_error():
    with pytest.raises(PassError, match=r"nothing of this model can be rotated: .*an operation that is not linear"):
        Pipeline([Rotate(what="stream")]).run(plan_of("bert"))
    report = Pipeline([Rotate()]).run(plan_of("bert"), planned=True).passes[0]
    assert [skip.reason for skip in report.skipped] == ["stays as it is: an operation that is not linear stands in it"]


def test_the_parts_of_an_mlp_stay_what_they_are():
    graph = plan_of("llama")
    before = roles(graph)
    Pipeline([Rotate(what="mlp")]).run(graph, planned=True)
    assert roles(graph) == before


@pytest.mark.parametrize("form", ["pivoted", "pair"])
def test_streams_that_factors_write_to_are_rotated_exactly_or_left_alone(form):
    """Pivoted factors make outputs of others, and put them in an order: none of that turns."""
    options = {"where": "mlp", "keep": 0.7, "metric": "plain", "ranks": "uniform", "bias": False}
    outputs = []
    for others in ([], [Rotate()]):
        graph = graph_of("llama")
        report = Pipeline([LowRank(form=form, **options), *others]).run(graph).passes[-1]
        outputs.append(run(graph, FAMILIES["llama"].inputs())["logits"])
    reasons = [skip.reason for skip in report.skipped if "ask for pairs" in skip.reason]
    assert len(reasons) == (form == "pivoted")
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4 * float(outputs[0].abs().max()))


def test_a_head_with_the_embeddings_table_gets_its_own_and_a_rerun_is_the_same():
    texts = []
    for _ in range(2):
        graph = graph_of("gemma")
        report = Pipeline([Rotate(what="stream", seed=3)]).run(graph).passes[0]
        texts.append([param.expr.key for param in graph.params.values()])
    assert any("a matrix of its own" in rewrite.what for rewrite in report.rewritten)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_what_mlps_read_is_rotated_in_the_generated_module(name, tmp_path):
    job = Job(name, tmp_path, [Rotate(what=("values", "mlp"))])
    job.out.mkdir()
    emit(emission_of(job.graph, "generated"), job.graph.sources, job.out)
    with torch.no_grad():
        theirs = load_model(job.out, trust_remote_code=True)(**job.family.inputs())
    assert distance(theirs, job.outputs()) <= TOLERANCE


def test_rotated_heads_keep_the_models_own_class(tmp_path):
    job = Job("llama", tmp_path, [Rotate(what=("values", "stream"))], tie_word_embeddings=True)
    assert job.emit().architecture == "LlamaForCausalLM"
    assert job.reload_error() <= TOLERANCE


def test_what_mlps_read_is_rotated_in_onnx(tmp_path):
    """Of 80 channels: the Hadamard matrix of 16, and cosines of 5."""
    family = FAMILIES["vit"]
    graph = graph_of(family.name)
    wanted = run(graph, family.inputs())["logits"]
    Pipeline([Rotate(what="mlp")]).run(graph)
    found = written(graph, tmp_path, "onnx").run(**family.inputs())["logits"]
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
