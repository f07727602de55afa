"""Scales and rotations of channels pass through graphs as their operations say, and change nothing that is computed."""

from __future__ import annotations

import pytest
import torch

from compiler.ir.graph import Graph, Node
from compiler.ir.layers import copy_of
from compiler.ir.verify import signature, verify
from compiler.pipeline import Pipeline
from compiler.rewrite.equivariance import Blocked, inner_region, region
from compiler.rewrite.labels import FREE, Labels
from compiler.rewrite.scaling import divide, turn_heads
from compiler.weights.ops.basic import literal
from passes import Rotate
from tests.captures import graph_of, plan_of
from tests.families import FAMILIES
from tests.graphs import tiny_llama
from tests.removed import double, outputs

ROUNDING = 512 * torch.finfo(torch.float64).eps
GELU = "`gelu` in `{}` does not let a scale pass"


def read_by(node: Node, inner: bool = False):
    """The region of what a product reads."""
    if inner:
        return lambda graph: inner_region(node)
    index, axis = (1 if node.op.name == "latent_attention" else 0), (1 if node.op.name == "conv" else -1)
    return lambda graph: region(graph, node.input(index), axis)


def products_of(graph: Graph):
    for node in graph.nodes_named("linear", "conv", "experts", "latent_attention"):
        yield node, read_by(node)
        if node.op.name == "experts":
            yield node, read_by(node, inner=True)


def random_scales(size: int, seed: int = 0):
    drawn = 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return literal(drawn.tolist(), (size,), torch.float64)


def scaled(graph: Graph) -> tuple[int, list[str]]:
    """Scale what every product reads, as often as it is read. How many could be, and why the others could not."""
    done, reasons = 0, []
    for number, (_, find) in enumerate(list(products_of(graph))):
        try:
            found = find(graph)
        except Blocked as blocked:
            reasons.append(blocked.cause)
            continue
        divide(found, random_scales(found.size, number))
        done += 1
    return done, reasons


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_and_rotations_change_nothing(name):
    family = FAMILIES[name]
    scales = double(graph_of(family.name))
    rotations, given = copy_of(scales), family.inputs(batch=2, tokens=5)
    wanted, expected = outputs(scales, given), signature(scales)
    done, _ = scaled(scales)
    assert done >= 2
    verify(scales, expected)
    report = Pipeline([Rotate(what=("values", "stream", "mlp"))]).run(rotations).passes[0]
    assert len(report.rewritten) >= 2
    for graph in (scales, rotations):
        for output, value in outputs(graph, given).items():
            assert (value - wanted[output]).abs().max() <= ROUNDING * wanted[output].abs().max()


REFUSED = {
    "llama": set(),
    "mixtral": set(),
    "deepseek_v3": set(),
    "gpt_oss": {"`experts` clamps what it reads"},
    "gpt2": {GELU.format("transformer.h.0.mlp.act"), "transformer.wte.weight is shared with `embedding`"},
    "bert": {
        "`layer_norm` in `bert.encoder.layer.0.attention.output.LayerNorm` averages over it",
        "`layer_norm` in `bert.encoder.layer.0.output.LayerNorm` averages over it",
        GELU.format("bert.encoder.layer.0.intermediate.intermediate_act_fn"),
        "bert.embeddings.word_embeddings.weight is shared with `embedding`",
    },
    "vit": {GELU.format("vit.layers.0.mlp.activation_fn"), "it is an input of the model"},
}
"""What cannot be scaled in the first layer and outside of layers, and why."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_in_the_way_is_said(name):
    _, reasons = scaled(plan_of(name))
    assert {reason for reason in reasons if ".1." not in reason} == REFUSED[name]


def test_heads_that_share_a_value_share_its_scales():
    graph = tiny_llama(layers=1)
    output = next(node for node in graph.nodes_named("linear") if node.scope.endswith("o_proj"))
    found = region(graph, output.input(0))
    value = next(param for param in found.factors if "v_proj" in param.name)
    assert found.size == value.expr.shape[0] < output.input(1).type.static_shape[1]
    assert {param.name.split(".")[-2] for param in found.factors} == {"v_proj", "o_proj"}


def test_a_norm_takes_the_scale_for_all_that_read_it():
    graph = tiny_llama(layers=1)
    query = next(node for node in graph.nodes_named("linear") if node.scope.endswith("q_proj"))
    found = region(graph, query.input(0))
    names = {param.name.split(".")[-2] for param in found.factors}
    assert names == {"input_layernorm", "q_proj", "k_proj", "v_proj"}
    assert {use.param.name.split(".")[-2] for use in found.readers} == {"q_proj", "k_proj", "v_proj"}


def test_what_multiplies_itself_passes_half_of_a_scale():
    """relu(x)^2 of a linear map: its rows take the root of what the next one takes."""
    graph = tiny_llama(layers=1)
    down = next(node for node in graph.nodes_named("linear") if node.scope.endswith("down_proj"))
    up = next(node for node in graph.nodes_named("linear") if node.scope.endswith("up_proj"))
    squared = graph.op("pow", [graph.op("relu", [up.output], before=down)], {"scalar": 2.0}, before=down)
    graph.set_input(down, 0, squared)
    found = region(graph, squared)
    assert [factor.exponent for factor in found.factors[up.input(1)]] == [-0.5]


def test_a_rotation_does_not_pass_a_gate():
    graph = tiny_llama(layers=1)
    down = next(node for node in graph.nodes_named("linear") if node.scope.endswith("down_proj"))
    with pytest.raises(Blocked, match="`mul`"):
        region(graph, down.input(0), rotations=True)


def test_a_head_of_which_a_weight_holds_a_part_is_not_turned():
    graph = tiny_llama(layers=1)
    output = next(node for node in graph.nodes_named("linear") if node.scope.endswith("o_proj"))
    cut = int(output.input(0).shape[-1]) - 1
    part = graph.op("slice", [output.input(0)], {"axis": 2, "start": 0, "stop": cut}, before=output)
    graph.set_input(output, 0, part)
    weight = output.input(1)
    weight.type = weight.type.with_shape((weight.type.static_shape[0], cut))
    found = region(graph, part, rotations=True)
    with pytest.raises(Blocked, match="part of a head"):
        turn_heads(found, literal([1.0] * 16, (4, 4), torch.float64))


def test_labels_that_meet_are_one():
    labels = Labels(4)
    labels.merge(torch.tensor([0, 2, FREE]), torch.tensor([1, 3, 0]))
    assert labels.resolved(torch.tensor([0, 1, 2, 3, FREE])).tolist() == [0, 0, 2, 2, FREE]
    labels.merge(torch.tensor([3]), torch.tensor([1]))
    assert labels.distinct.tolist() == [0]
    assert labels.shrunk(torch.tensor([[0, 1], [2, 3]])).shape == (1, 1)
