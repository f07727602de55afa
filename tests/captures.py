"""Families' tiny models, traced and saved once a process: tracing costs more than what most tests do with a graph."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from compiler.frontend import capture
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of
from compiler.weights.expr import loads
from compiler.weights.source import MemorySource
from tests.families import FAMILIES


def graph_of(name: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, layers: int = 2, **changes: Any) -> Graph:
    """The graph of a random model of a family, to be rewritten; ``changes`` are options of its config."""
    model = FAMILIES[name].build(seed, layers, **changes).to(dtype)
    if dtype != torch.float32:
        return capture(model)
    graph, tensors = plan_of(name, layers=layers, **changes), model.state_dict()
    keys = {load.attr("key") for load in loads([param.expr for param in graph.params.values()])}
    graph.sources["model"] = MemorySource({key: tensors[key] for key in keys})
    return graph


def plan_of(name: str, **changes: Any) -> Graph:
    """The graph of a family without weights, to be rewritten."""
    return _own(_planned(name, _Key({"layers": 2, **changes})))


def saved(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Path, Graph]:
    """A checkpoint of a family's random model, not to be changed, and its graph, to be rewritten."""
    directory, graph = _saved(name, dtype, _Key({"layers": 2, **changes}))
    return Path(directory.name), _own(graph)


class _Key:
    """Options that can be looked up."""

    def __init__(self, options: dict[str, Any]):
        self.options = options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and repr(self.options) == repr(other.options)

    def __hash__(self) -> int:
        return hash(repr(self.options))


def _own(graph: Graph) -> Graph:
    copy = copy_of(graph)
    copy.sources = dict(graph.sources)
    return copy


@cache
def _planned(name: str, key: _Key) -> Graph:
    config = FAMILIES[name].config(**{"dtype": "float32", **key.options})
    return capture(config, architecture=FAMILIES[name].architecture)


@cache
def _saved(name: str, dtype: torch.dtype, key: _Key) -> tuple[tempfile.TemporaryDirectory[str], Graph]:
    directory = tempfile.TemporaryDirectory()
    FAMILIES[name].build(**key.options).to(dtype).save_pretrained(directory.name)
    return directory, capture(directory.name)
