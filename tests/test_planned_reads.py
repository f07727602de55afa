"""A planned run says that weights are read wherever a real one reads a weight or calibration data: jobs go by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from compiler.errors import CompressError
from compiler.ir.graph import Graph
from compiler.pipeline import Pass, Pipeline
from compiler.weights.source import MemorySource
from passes import Quantize, pass_class, pass_names
from tests.captures import graph_of, plan_of

BASES: dict[str, list[dict[str, Any]]] = {
    "any-size": [{"blocks": 2}],
    "drop-tokens": [{"keep": 0.5, "layers": "0"}],
    "gqa-to-mla": [{}, {"rank": 16}, {"cache": 0.5}],
    "low-rank": [{"keep": 0.7}, {"keep": 1.0}],
    "prune": [
        {"keep": 0.8, "align": 4},
        {"keep": 0.8, "align": 4, "score": "magnitude"},
        {"keep": 100, "what": "vocabulary"},
    ],
    "quantize": [
        {"bits": 4, "group": 16},
        {"bits": 3.5, "group": 16},
        {"type": "codebook", "bits": 3},
        {"type": "fp8"},
    ],
    "residual": [{"add": 0.2}],
    "smooth": [{"group": 16}],
    "sparsify": [{"keep": 0.5}, {"pattern": "2:4"}],
}
FAMILY = "llama"
LAZY = ("rotate",)  # what turns is multiplied with when it is written
BEFORE = {"residual": (Quantize(bits=4),)}


class Read(Exception):
    """Raised where a real run reads."""


class Unread(MemorySource):
    """Weights that are not to be read."""

    def read(self, key: str):
        raise Read(key)

    def read_rows(self, key: str, start: int, stop: int):
        raise Read(key)


@cache
def unread() -> Unread:
    source = graph_of(FAMILY).sources["model"]
    return Unread({key: source.read(key) for key in source.types})


def choices(kind: Any) -> list[Any]:
    """What an option of a type can be, of what has a name."""
    inner = [value for part in get_args(kind) for value in choices(part)]
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if get_origin(kind) is tuple:
        return [(value,) for value in inner]
    return [True, False] if kind is bool else inner


def variants(cls: type[Pass]) -> Iterator[Pass]:
    """A pass with its options, each in turn with every choice that has a name and is not refused beside the others."""
    hints = get_type_hints(cls)
    for base in BASES.get(cls.key(), [{}]):
        yield cls(**base)
        for name, value in ((field.name, value) for field in fields(cls) for value in choices(hints[field.name])):
            with suppress(CompressError):
                yield cls(**{**base, name: value})


def planned(steps: Sequence[Pass]) -> bool:
    """Whether a planned run says that it reads. Raises CompressError where the model cannot have it."""
    return Pipeline(steps).run(plan_of(FAMILY), planned=True, calibration=lambda _: []).read_weights


def reads(steps: Sequence[Pass]) -> bool:
    """Whether a real run wants a weight or calibration data."""

    def calibration(graph: Graph):
        raise Read

    graph = plan_of(FAMILY)
    graph.sources["model"] = unread()
    try:
        Pipeline(steps).run(graph, calibration=calibration)
    except Read:
        return True
    return False


@pytest.mark.parametrize("key", pass_names())
def test_what_reads_says_so_when_planned(key):
    found: list[bool] = []
    for step in variants(pass_class(key)):
        steps = (*BEFORE.get(key, ()), step)
        try:
            said = planned(steps)
        except CompressError:
            continue
        found.append(reads(steps))
        assert said or not found[-1], step
    assert found and any(found) == (key not in LAZY)
