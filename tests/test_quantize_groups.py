"""Groups whose size is searched for: fine where magnitudes differ along rows, coarse where they do not."""

from __future__ import annotations

import pytest
import torch

from compiler.errors import PassError
from compiler.ir.graph import Graph
from compiler.pipeline import Pipeline
from compiler.weights.expr import load
from compiler.weights.source import MemorySource
from passes.quantize import Quantize
from tests.captures import graph_of
from tests.emitted import TOLERANCE, Job

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
