"""Codebooks: tables that only gain with bits, checkpoints that compute as their graph, sizes that are known before."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from compiler.errors import PassError, TargetError
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.pipeline import Pipeline
from compiler.plan import bytes_in_file
from compiler.target import emission_of
from compiler.weights.evaluate import evaluate
from compiler.weights.ops import take
from compiler.weights.ops.codebook import Codebook
from compiler.weights.ops.integer import Integer
from passes import Quantize
from tests.captures import graph_of
from tests.families import FAMILIES
from tests.test_codecs import by_group
from tests.test_generated import error, tolerance, written
from tests.test_generated_packed import matrices_of
from tests.test_packing import bound, weights

KINDS = [False, True]
SCHEMES = ((2, 0, False), (3, 8, True), (4, 0, True), (3, 0, False))
"""Bits, group and whether tables are linear, which weights get in turn."""


def squared_error(weight: torch.Tensor, codec: Codebook | Integer) -> float:
    (expr,), sources = bound(w=weight)
    (found,) = evaluate([codec.nearest(expr)], sources)
    return float((found.double() - weight.double()).square().sum())


@pytest.mark.parametrize("linear", KINDS)
@settings(max_examples=8, deadline=None)
@given(made=weights())
def test_more_bits_never_cost_more(made, linear):
    weight, group = made
    errors = [squared_error(weight, Codebook(bits, group, weight.dtype, linear)) for bits in (2, 3, 4)]
    assert all(more <= less * (1 + 1e-5) for less, more in pairwise(errors))


@pytest.mark.parametrize("linear", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_free_tables_are_nearer_than_even_steps(bits, linear):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits))
    even = squared_error(weight, Integer(bits, 32, weight.dtype, symmetric=False, search=False))
    assert squared_error(weight, Codebook(bits, 32, weight.dtype, linear)) < even


@pytest.mark.parametrize("linear", KINDS)
def test_even_steps_are_exact(linear):
    codes = torch.arange(8.0).repeat(6, 4)[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(squared_error(codes / 4 - 1, Codebook(3, 16, torch.float32, linear)), 0.0)


@pytest.mark.parametrize("linear", KINDS)
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_by_themselves_and_ranges_of_rows_are_those_of_the_whole(group, linear, dtype):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    codec = Codebook(3, group, dtype, linear)
    (expr,), sources = bound(w=weight)
    whole = codec.nearest(expr)
    for ours, theirs in zip(by_group(codec, weight), evaluate(list(whole.args), sources), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    values, part = evaluate([whole, take(whole, 0, 5, 9)], sources)
    assert torch.equal(values[5:9], part)


def looked_up(graph: Graph) -> Graph:
    """``graph`` with codebooks for all its matrices, which differ from neighbour to neighbour."""
    for index, param in enumerate(matrices_of(graph)):
        bits, group, linear = SCHEMES[index % len(SCHEMES)]
        group = group if group and param.type.shape[-1] % group == 0 else 0
        param.expr = Codebook(bits, group, param.storage, linear).nearest(param.expr)
    return graph


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert", "whisper"])
def test_codebooks_compute_as_their_graph(name, tmp_path):
    """In linear maps, tables of tokens, tied or not, and experts; what is written is what was counted before."""
    graph, given_inputs = looked_up(graph_of(name)), FAMILIES[name].inputs()
    counted = sum(map(bytes_in_file(), matrices_of(graph)))
    model = written(graph, tmp_path / name)
    held = load_file(tmp_path / name / "model.safetensors")
    assert counted == sum(part.nbytes for key, part in held.items() if key.endswith(("weight_packed", "weight_table")))
    given_inputs = {key: value for key, value in given_inputs.items() if key in graph.inputs}
    with torch.no_grad():
        found = model(**given_inputs)
    for key, value in run(graph, given_inputs).items():
        assert error(found[key], value) <= tolerance(graph)


def test_the_pass_makes_them_and_stock_formats_refuse_them():
    graph = graph_of("llama")
    (report,) = Pipeline([Quantize(where="mlp", type="codebook", bits=3)]).run(graph).passes
    assert all("codebook of 3 bits, one table a row" in entry.what for entry in report.rewritten)
    made = emission_of(graph)
    assert made.files and "compressed-tensors has no codebooks" in made.no_stock
    with pytest.raises(TargetError, match="codebook"):
        emission_of(graph, "stock")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "codebook"}, "2 to 4 bits, not 8"),
        ({"type": "codebook", "bits": 3, "scale": "robust"}, "for integers, not for codebook"),
        ({"type": "bit-serial", "bits": 3, "symmetric": False}, "asymmetric"),
        ({"type": "codebook", "bits": 3.5, "widths": (3, 5)}, "2 to 4 bits"),
    ],
)
def test_options_that_codebooks_do_not_have(options, message):
    with pytest.raises(PassError, match=message):
        Pipeline([Quantize(**options)]).run(graph_of("llama"))
