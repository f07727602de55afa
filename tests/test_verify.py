"""The verifier: a sound graph passes, and every broken invariant is named with its node and scope."""

from __future__ import annotations

import pytest
import torch

from compiler.errors import VerifyError
from compiler.ir.graph import Graph
from compiler.ir.types import TensorType
from compiler.ir.verify import signature, verify
from compiler.weights.expr import load
from tests.graphs import tiny_llama


def test_a_sound_graph_passes():
    graph = tiny_llama()
    verify(graph, signature(graph))


def _use_before_definition(graph: Graph) -> None:
    nodes = list(graph.nodes)
    graph.move_before(nodes[-1], nodes[4])


def _foreign_value(graph: Graph) -> None:
    other = tiny_llama(layers=1)
    graph.set_input(graph.nodes_named("silu")[0], 0, other.nodes_named("linear")[4].output)


def _wrong_type(graph: Graph) -> None:
    graph.nodes_named("linear")[0].output.type = TensorType(torch.float32, ("B", "T", 99))


def _stale_use(graph: Graph) -> None:
    node = graph.nodes_named("silu")[0]
    node.input(0).users[node] = 2


def _unbound_param(graph: Graph) -> None:
    del graph.params["model.layers.1.mlp.up_proj.weight"]


def _misfiled_param(graph: Graph) -> None:
    graph.params["other"] = graph.params.pop("model.norm.weight")


def _wrong_expression(graph: Graph) -> None:
    graph.params["model.norm.weight"].expr = load("model", "x", TensorType(torch.bfloat16, (3,)))


def _doubled_name(graph: Graph) -> None:
    graph.params["model.norm.weight"].aliases = ("lm_head.weight",)


def _foreign_output(graph: Graph) -> None:
    graph.outputs["logits"] = tiny_llama(layers=1).outputs["logits"]


def _default_attribute(graph: Graph) -> None:
    graph.nodes_named("attention")[0].attrs["window"] = 0


def _refused_operands(graph: Graph) -> None:
    graph.nodes_named("split_heads")[0].attrs["heads"] = 7


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _use_before_definition,
            "reads operand 0 before it is defined: `rms_norm` in `model.norm`",
        ),
        (_foreign_value, "`silu` in `model.layers.0.mlp.act_fn` reads operand 0 before it is defined"),
        (
            _wrong_type,
            "q_proj` has type f32[B,T,99], but its operands give f32[B,T,16]",
        ),
        (_stale_use, "the use list of"),
        (_unbound_param, "`model.layers.1.mlp.up_proj.weight` does not come earlier"),
        (_misfiled_param, "`model.norm.weight` is filed under the name `other`"),
        (_wrong_expression, "parameter `model.norm.weight` is f32[16], but its expression makes bf16[3]"),
        (_doubled_name, "the name `lm_head.weight` is given twice"),
        (_foreign_output, "output `logits` is not a value of the graph"),
        (_default_attribute, "`attention` in `model.layers.0.self_attn` keeps attributes at their default"),
        (_refused_operands, "width 16 does not split into 7 heads"),
    ],
)
def test_every_broken_invariant_is_named(damage, message):
    graph = tiny_llama()
    damage(graph)
    with pytest.raises(VerifyError) as raised:
        verify(graph)
    assert message in str(raised.value)


def test_inputs_and_outputs_must_be_preserved():
    graph = tiny_llama()
    before = signature(graph)
    graph.outputs["hidden"] = graph.nodes_named("rms_norm")[-1].output
    with pytest.raises(VerifyError) as raised:
        verify(graph, before)
    assert "the outputs of the graph changed from (logits: f32[B,T,32]) to (logits: f32[B,T,32], hidden" in str(
        raised.value
    )
