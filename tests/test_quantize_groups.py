"""Groups whose size is searched for: fine where magnitudes differ along rows, coarse where they do not."""

from __future__ import annotations

import json

import pytest
import torch

from compiler import Recipe
from compiler.cli import main
from compiler.errors import PassError
from compiler.ir.graph import Graph
from compiler.ir.types import TensorType
from compiler.pipeline import Pipeline
from compiler.plan import make_plan
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import load
from compiler.weights.ops.codec import CHUNK_ELEMENTS
from compiler.weights.ops.integer import Integer
from compiler.weights.source import MemorySource
from passes.quantize import Quantize
from passes.quantize.granularity import rounding_loss
from tests.captures import graph_of
from tests.emitted import TOLERANCE, Job
from tests.small import write_folder, write_recipe

WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}


def with_magnitudes(graph: Graph, factor: float) -> Graph:
    """``graph`` with weights of one magnitude, but of the first 32 inputs, of which it is ``factor`` times as large."""
    values = {}
    for index, (name, param) in enumerate(graph.params.items()):
        if param.type.rank == 2 and "layers" in name:
            rows, width = param.type.static_shape
            weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(index))
            weight[:, :32] *= factor
            values[name] = weight
    graph.sources = {**graph.sources, "made": MemorySource(values)}
    for name in values:
        graph.params[name].expr = load("made", name, graph.params[name].type)
    return graph


def sizes(graph: Graph) -> dict[str, int]:
    return {name: p.expr.attr("group") for name, p in graph.params.items() if p.expr.op == "dequantize"}


@pytest.mark.parametrize("factor", [1.0, 6.0])
def test_groups_are_finer_where_magnitudes_differ(factor):
    graph = with_magnitudes(graph_of("llama", **WIDE), factor)
    Pipeline([Quantize(where="mlp", bits=4, group="search")]).run(graph)
    found = sizes(graph)
    assert set(found.values()) == {0} if factor == 1 else all(found.values())
    assert all(size == found[name.replace("gate", "up")] for name, size in found.items())


def test_several_sizes_are_written_and_load(tmp_path):
    job = Job("llama", tmp_path, [Quantize(bits=4, group="search", skip=("head",))])
    job.emit()
    assert job.reload_error() <= TOLERANCE


@pytest.mark.parametrize("options", [{"type": "mxfp4"}, {"method": "gptq", "bits": 4}])
def test_where_groups_are_not_searched_for(options):
    with pytest.raises(PassError, match="searched for"):
        Pipeline([Quantize(group="search", **options)]).run(graph_of("llama"))


def test_the_command_searches_too(tmp_path):
    """And not only the plan, which knows no weights, before it."""
    recipe = write_recipe(write_folder(tmp_path), "[quantize: {where: mlp, bits: 4, group: search}]")
    assert main([str(recipe), "-o", str(tmp_path / "out"), "--quiet"]) == 0
    report = json.loads((tmp_path / "out" / "compress" / "report.json").read_text())
    whats = {entry["what"] for entry in report["passes"][0]["rewritten"]}
    planned = make_plan(Recipe.load(recipe)).report.passes[0].rewritten
    assert whats == {"int4, symmetric, one scale a row"} and whats.isdisjoint(entry.what for entry in planned)


@pytest.mark.parametrize("symmetric", [True, False])
def test_losses_are_those_of_what_is_written(symmetric, monkeypatch):
    """The search rounds a few rows at a time, and in no more memory, what expressions round at once."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    held: list[int] = []
    fit = Integer.fit
    monkeypatch.setattr(Integer, "fit", lambda self, values: held.append(values.numel()) or fit(self, values))
    codec = Integer(4, 64, weight.dtype, symmetric)
    loss = rounding_loss(weight, codec)
    rounded = codec.nearest(load("made", "w", TensorType(weight.dtype, weight.shape)))
    exact = (evaluate([rounded], {"made": MemorySource({"w": weight})})[0].float() - weight.float()).square().sum()
    assert loss == pytest.approx(float(exact), rel=1e-5)
    assert sum(held) == weight.numel() and max(held) <= CHUNK_ELEMENTS


@pytest.mark.parametrize("options", [{"steps": 10}, {"type": "codebook", "bits": 3, "scale": "minmax"}])
def test_options_that_nothing_would_read_are_refused(options):
    with pytest.raises(PassError) as error:
        Pipeline([Quantize(**options)]).run(graph_of("llama"))
    assert error.value.option in options and error.value.option not in ("type", "bits")
