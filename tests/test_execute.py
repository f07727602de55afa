"""Execution: a graph computes what its operations say, node by node and lowered to torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from compiler.errors import OpError
from compiler.ir.execute import bind_dims, evaluate_dim, read_param, run, run_nodes, to_torch
from compiler.ir.graph import Graph, Value
from compiler.ir.types import TensorType, named_multiple, resolve_dim
from compiler.weights.ops.basic import literal
from tests.captures import graph_of
from tests.families import FAMILIES
from tests.graphs import Builder, tiny_llama, tokens

EXACT = {"rtol": 0, "atol": 0}


def test_dims_that_are_a_name_so_many_times():
    assert [named_multiple(dim) for dim in ("T", "4*B")] == [("T", 1), ("B", 4)]
    assert [named_multiple(dim) for dim in (3, "T+1", "B*T", "2*B*T", "floor(T/2)", "T**2")] == [None] * 6


def test_run_computes_what_plain_torch_computes():
    builder = Builder()
    x = builder.graph.add_input("x", TensorType(torch.float32, ("B", 8)))
    hidden = builder.graph.op("silu", [builder.linear(x, "up", 12, bias=True)])
    graph = builder.done(y=builder.linear(hidden, "down", 8))
    weights = {name: tensor.float() for name, tensor in builder.tensors.items()}
    given = torch.randn(3, 8)
    expected = F.linear(F.silu(F.linear(given, weights["up.weight"], weights["up.bias"])), weights["down.weight"])
    torch.testing.assert_close(run(graph, {"x": given})["y"], expected, **EXACT)


def test_a_weight_runs_as_it_is_written():
    graph = Graph("g")
    values = literal([1.0 + 2**-12, 1 / 3], dtype=torch.float64)
    kept = graph.add_param("kept", values, torch.bfloat16, dtype=torch.float32)
    table = graph.add_param("table", values, torch.bfloat16, dtype=torch.float32, persistent=False)
    assert read_param(graph, kept).dtype == torch.float32
    assert read_param(graph, kept).tolist() == [1.0, torch.tensor(1 / 3).bfloat16().item()]
    assert read_param(graph, table).tolist() == [1.0 + 2**-12, torch.tensor(1 / 3).item()]


@pytest.mark.parametrize("length", [1, 7])
def test_lowered_module_equals_run(length):
    graph = tiny_llama()
    given = tokens(length=length)
    torch.testing.assert_close(to_torch(graph)(**given)["logits"], run(graph, given)["logits"], **EXACT)


@pytest.mark.parametrize("name", ["gpt2", "t5", "deepseek_v3"])
def test_lowered_families_equal_run(name):
    family = FAMILIES[name]
    graph, given = graph_of(family.name, seed=3), family.inputs(batch=3, tokens=6, seed=1)
    given = {key: given[key] for key in graph.inputs}
    expected, found = run(graph, given), graph.to_torch()(**given)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, **EXACT)


def test_lowered_module_holds_the_parameters_under_their_names():
    graph = tiny_llama(layers=1)
    module = to_torch(graph)
    persistent = {name for name, param in graph.params.items() if param.persistent}
    assert set(module.state_dict()) == persistent
    assert dict(module.named_parameters()).keys() == persistent
    assert all(tensor.dtype == torch.float32 for tensor in module.parameters())
    assert set(dict(module.named_buffers())) == {"model.rotary_emb.inv_freq"}


def test_lowered_module_can_be_exported_with_dynamic_shapes():
    graph = tiny_llama()
    given = tokens()
    dynamic = {"input_ids": {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("T", min=2, max=64)}}
    exported = torch.export.export(to_torch(graph), (), given, dynamic_shapes=dynamic).module()
    other = tokens(batch=3, length=11)
    torch.testing.assert_close(exported(**other)["logits"], run(graph, other)["logits"], rtol=0, atol=1e-6)


def test_lowered_module_can_be_compiled():
    graph = tiny_llama(layers=1)
    compiled = torch.compile(to_torch(graph), backend="aot_eager", fullgraph=True, dynamic=True)
    for given in (tokens(), tokens(batch=3, length=9)):
        torch.testing.assert_close(compiled(**given)["logits"], run(graph, given)["logits"], rtol=0, atol=1e-6)


def test_everything_is_computed_where_the_caller_says():
    graph, given = tiny_llama(), {"input_ids": tokens()["input_ids"].to("meta")}
    places = set()
    result = run(graph, given, device="meta", observe=lambda value, tensor: places.add(tensor.device.type))
    assert places == {"meta"}
    assert result["logits"].shape == (2, 7, 32)
    assert to_torch(graph).to("meta")(**given)["logits"].shape == (2, 7, 32)
    assert to_torch(graph, device="meta")(**given)["logits"].device.type == "meta"


@pytest.mark.parametrize("dim", ["T*T", "floor(T/2)", "Max(3,T)", "B*T+1"])
def test_computed_dims_are_lowered(dim):
    graph = Graph("dims")
    x = graph.add_input("x", TensorType(torch.float32, ("B", "T")))
    graph.outputs["y"] = graph.op("arange", [], {"stop": dim})
    graph.outputs["x"] = graph.op("reshape", [x], {"shape": ("B*T",)})
    for shape in ((2, 3), (1, 5)):
        result = to_torch(graph)(x=torch.zeros(shape))
        assert (
            len(result["y"])
            == evaluate_dim(dim, {"B": shape[0], "T": shape[1]})
            == len(run(graph, {"x": torch.zeros(shape)})["y"])
        )


def test_gradients_reach_every_weight():
    module = to_torch(tiny_llama(layers=1))
    module(**tokens())["logits"].square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_values_are_dropped_after_their_last_use():
    graph = tiny_llama()
    seen: list[Value] = []
    values = {graph.inputs["input_ids"]: tokens()["input_ids"]}
    nodes = list(graph.nodes)

    def observe(value, tensor):
        seen.append(value)
        later = nodes[nodes.index(value.node) :]
        assert all(known.users.keys() & set(later) for known in values)

    run_nodes(graph, nodes, values, {"B": 2, "T": 7}, keep=graph.outputs.values(), observe=observe)
    assert seen == [value for node in nodes for value in node.outputs]
    assert list(values) == list(graph.outputs.values())


def test_one_layer_can_be_run_alone():
    graph = tiny_llama()
    kept: dict[Value, torch.Tensor] = {}
    run(graph, tokens(), observe=lambda value, tensor: kept.update({value: tensor}))
    layer = [node for node in graph.nodes if node.scope.startswith("model.layers.1")]
    outside = {value for node in layer for value in node.inputs if value in kept and value.node not in layer}
    values = {value: kept[value] for value in outside}
    last = layer[-1].output
    run_nodes(graph, layer, values, {"B": 2, "T": 7}, keep=[last])
    torch.testing.assert_close(values[last], kept[last], **EXACT)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "takes inputs input_ids"),
        ({"input_ids": torch.zeros(2, dtype=torch.int64)}, "input `input_ids` must be i64[B,T], got shape [2]"),
        ({"ids": torch.zeros(2, 2)}, "takes inputs input_ids; got ids"),
    ],
)
def test_wrong_inputs_are_refused(given, message):
    with pytest.raises(OpError) as raised:
        run(tiny_llama(layers=1), given)
    assert message in str(raised.value)


def test_one_dim_has_one_size():
    graph = Graph("two")
    for name in ("x", "y"):
        graph.add_input(name, TensorType(torch.float32, ("B", 4)))
    assert bind_dims(graph, {"x": torch.zeros(3, 4), "y": torch.zeros(3, 4)}) == {"B": 3}
    with pytest.raises(OpError, match="input `y` must be"):
        bind_dims(graph, {"x": torch.zeros(3, 4), "y": torch.zeros(2, 4)})


@pytest.mark.parametrize(
    "dim",
    [
        "T",
        "4*B*T",
        "T+1",
        "B-T",
        "T**2",
        "floor(T/2)",
        "ceiling(T/2)",
        "floor(T/2+1/2)",
        "Max(1,T)",
        "Mod(T,3)",
        "T*(B+2)",
    ],
)
def test_dims_are_evaluated_as_sympy_does(dim):
    for batch in (1, 2, 5):
        for length in (1, 4, 7):
            bindings = {"B": batch, "T": length}
            assert evaluate_dim(dim, bindings) == resolve_dim(dim, bindings)
    assert evaluate_dim("floor(T/2)", {"T": 7}) == math.floor(3.5)


def test_undetermined_dims_are_refused():
    with pytest.raises(OpError, match="the dim `S` is not determined by B"):
        evaluate_dim("S+1", {"B": 2})
