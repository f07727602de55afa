"""A narrower residual stream computes what the wide one does with the rest of it at zero, on every family."""

from __future__ import annotations

import pytest
import torch

from compiler.errors import PassError
from compiler.ir.coupling import CouplingGroup, coupling_groups
from compiler.ir.graph import Graph, Node
from compiler.ir.layers import copy_of
from compiler.ir.verify import signature, verify
from compiler.rewrite.rotation import turn, unscale
from compiler.rewrite.stream import narrow, residual
from compiler.weights.ops.basic import literal
from tests.captures import graph_of, plan_of
from tests.families import FAMILIES
from tests.removed import double, outputs, zero

ROUNDING = 512 * torch.finfo(torch.float64).eps
GONE = (1, 7, 30)
TO_THE_OUTPUT = {"dinov2", "clip_vision", "clip_text", "siglip_vision", "siglip_text", "t5"}
"""Families whose stream is itself a result, or is joined from two by position."""
SCALED = {"gemma2", "gemma3", "olmo2", "bert", "roberta", "modernbert"}
"""Families in which the scale of a norm stands before the stream."""


def stream_groups(graph: Graph) -> list[CouplingGroup]:
    return [group for group in coupling_groups(graph) if residual(group) and not group.frozen]


def average_over(graph: Graph, group: CouplingGroup, kept: list[int]) -> None:
    """Let the layer norms of ``group`` subtract the mean of what is kept: they are root mean squares then."""
    size = group.size
    mask = torch.zeros(size, dtype=torch.float64)
    mask[kept] = 1
    centre = torch.diag(mask) - torch.outer(mask, mask) / len(kept)
    inside = {value for value, _, _ in group.values}
    nodes = [node for node in graph.nodes_named("layer_norm") if node.output in inside]
    for number, node in enumerate(nodes):
        matrix = graph.add_param(f"centre{number}", literal(centre.flatten().tolist(), (size, size), torch.float64))
        matrix.type = matrix.type.with_dtype(torch.float64)
        _as_rms(graph, node, matrix)


def _as_rms(graph: Graph, node: Node, matrix) -> None:
    here = {"scope": node.scope, "before": node}
    centred = graph.op("linear", [node.input(0), matrix], **here)
    made = graph.op("rms_norm", [centred, node.optional_input(1)], {"eps": node.attr("eps")}, **here)
    shift = node.optional_input(2)
    graph.replace(node.output, made if shift is None else graph.op("add", [made, shift], **here))
    graph.erase(node)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_narrower_stream_is_one_with_the_others_at_zero(name):
    family = FAMILIES[name]
    graph = double(graph_of(family.name))
    given = family.inputs(batch=1, tokens=5)
    found_groups = stream_groups(graph)
    assert bool(found_groups) != (name in TO_THE_OUTPUT)
    for number, group in enumerate(found_groups):
        kept = [index for index in range(group.size) if index not in GONE]
        narrowed, zeroed = copy_of(graph), copy_of(graph)
        expected = signature(narrowed)
        narrow(narrowed, stream_groups(narrowed)[number], kept)
        verify(narrowed, expected)
        there = stream_groups(zeroed)[number]
        zero(zeroed, there, kept)
        average_over(zeroed, there, kept)
        found, wanted = outputs(narrowed, given), outputs(zeroed, given)
        for output, value in wanted.items():
            assert (found[output] - value).abs().max() <= ROUNDING * value.abs().max()


def rotated(graph: Graph) -> None:
    """Turn every stream by a random orthogonal matrix."""
    for number in range(len(stream_groups(graph))):
        unscale(graph, stream_groups(graph)[number])
        group = stream_groups(graph)[number]
        noise = torch.randn(
            group.size, group.size, dtype=torch.float64, generator=torch.Generator().manual_seed(number)
        )
        basis = torch.linalg.qr(noise)[0]
        turn(graph, group, literal(basis.flatten().tolist(), basis.shape, torch.float64))


def refused(name: str) -> str:
    family = FAMILIES[name]
    with pytest.raises(PassError) as raised:
        rotated(plan_of(family.name))
    return raised.value.cause


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TO_THE_OUTPUT | SCALED])
def test_a_turned_stream_computes_the_same(name):
    family = FAMILIES[name]
    graph = double(graph_of(family.name))
    given = family.inputs(batch=1, tokens=5)
    wanted = outputs(graph, given)
    expected = signature(graph)
    rotated(graph)
    verify(graph, expected)
    for output, value in outputs(graph, given).items():
        assert (value - wanted[output]).abs().max() <= ROUNDING * wanted[output].abs().max()


@pytest.mark.parametrize("name", sorted(SCALED))
def test_a_stream_that_norms_write_to_is_not_turned_and_the_reason_given(name):
    assert "norm writes to it" in refused(name) or "not linear" in refused(name)


@pytest.mark.parametrize("first", [False, True])
def test_a_vector_that_multiplies_what_is_written_goes_into_what_writes_it(first):
    graph = double(graph_of("llama"))
    given = FAMILIES["llama"].inputs(batch=1, tokens=5)
    node = next(node for node in graph.nodes_named("linear") if node.scope.endswith("down_proj"))
    size = int(node.output.shape[-1])
    vector = graph.add_param("scale", literal([0.5 + i / size for i in range(size)], (size,), torch.float64))
    vector.type = vector.type.with_dtype(torch.float64)
    (after,) = node.output.users
    made = graph.op("mul", [vector, node.output] if first else [node.output, vector], scope=node.scope, before=after)
    graph.set_input(after, after.inputs.index(node.output), made)
    wanted = outputs(graph, given)["logits"]
    rotated(graph)
    assert (outputs(graph, given)["logits"] - wanted).abs().max() <= ROUNDING * wanted.abs().max()
