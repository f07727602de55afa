"""Rewriting: patterns match what they say, rules run to a fixpoint, and what does not fit says why and where."""

from __future__ import annotations

import pytest
import torch

from compiler.errors import VerifyError
from compiler.ir.execute import run
from compiler.ir.graph import Graph, Value
from compiler.ir.types import TensorType
from compiler.ir.verify import signature, verify
from compiler.rewrite.driver import rewrite
from compiler.rewrite.pattern import Match, Mismatch, attr, either, match, op, param, rule, var
from compiler.rewrite.site import Refused, Site
from compiler.weights.expr import load
from compiler.weights.source import MemorySource

X, W = var("x"), param("weight")
SQUARE = either(op("pow", X, scalar=2.0), op("mul", X, X))
NORM = op("mul", W, op("mul", X, op("rsqrt", op("add", op("mean", SQUARE, axes=(2,), keep=True), scalar=attr("eps")))))


@rule(NORM)
def norm(site: Site, found: Match) -> Value | Refused:
    """The norm that the pattern spells out."""
    if found.weight("weight").type.rank != 1:
        return Refused("the weight is no vector")
    return site.op("rms_norm", found.value("x"), found.weight("weight"), eps=found["eps"])


@rule(op("neg", op("neg", X)))
def double_negation(site: Site, found: Match) -> Value:
    return found.value("x")


def spelled_out(*, square: str = "pow", swap: bool = False, eps: float = 0.5, shape: tuple[int, ...] = (4,)) -> Graph:
    graph = Graph("norm")
    x = graph.add_input("x", TensorType(torch.float32, ("B", "T", 4)))
    graph.sources["model"] = MemorySource({"w": torch.randn(shape)})
    weight = graph.add_param("w", load("model", "w", TensorType(torch.float32, shape)))
    squared = (
        graph.op("pow", [x], {"scalar": 2.0}, scope="n") if square == "pow" else graph.op("mul", [x, x], scope="n")
    )
    mean = graph.op("mean", [squared], {"axes": (2,), "keep": True}, scope="n")
    root = graph.op("rsqrt", [graph.op("add", [mean], {"scalar": eps}, scope="n")], scope="n")
    normed = graph.op("mul", [root, x] if swap else [x, root], scope="n")
    graph.outputs["y"] = graph.op("mul", [normed, weight] if swap else [weight, normed], scope="n")
    return graph


@pytest.mark.parametrize("square", ["pow", "mul"])
@pytest.mark.parametrize("swap", [False, True])
def test_a_pattern_matches_in_all_its_forms_and_keeps_the_function(square, swap):
    graph = spelled_out(square=square, swap=swap)
    given = {"x": torch.randn(2, 3, 4)}
    before, taken = run(graph, given)["y"], signature(graph)
    outcome = rewrite(graph, {"mul": (norm,)})
    verify(graph, taken)
    assert [(node.op.name, node.scope, node.attrs) for node in graph.nodes] == [("rms_norm", "n", {"eps": 0.5})]
    assert outcome.applied == {"norm": 1}
    assert outcome.refused == []
    torch.testing.assert_close(run(graph, given)["y"], before, rtol=1e-6, atol=1e-6)


def mismatch(graph: Graph, pattern=NORM) -> Mismatch:
    found = match(pattern, graph.outputs["y"].node)
    assert isinstance(found, Mismatch)
    return found


def test_a_match_binds_names():
    graph = spelled_out(eps=0.25)
    found = match(NORM, graph.outputs["y"].node)
    assert isinstance(found, Match)
    assert found["eps"] == 0.25
    assert found.value("x") is graph.inputs["x"]
    assert found.weight("weight") is graph.params["w"]
    assert len(found.nodes) == 6


def test_the_deepest_mismatch_is_reported():
    graph = spelled_out()
    cube = graph.nodes_named("pow")[0]
    cube.attrs["scalar"] = 3.0
    found = mismatch(graph)
    assert (found.reason, found.where, found.fitted) == ("`pow` has scalar=3.0, not 2.0", cube, 5)


def test_a_name_means_one_value():
    graph = spelled_out()
    other = graph.op("exp", [graph.inputs["x"]], before=next(graph.nodes))
    graph.set_input(graph.nodes_named("pow")[0], 0, other)
    assert mismatch(graph).reason == "an operand of `pow` is not the same value as x"


def test_operands_must_be_weights_where_the_pattern_says_so():
    graph = spelled_out()
    graph.set_input(graph.outputs["y"].node, 0, graph.inputs["x"])
    assert "`mul` should be a weight (weight)" in mismatch(graph).reason


def test_attributes_that_a_pattern_does_not_name_have_their_default():
    graph = spelled_out()
    graph.outputs["y"] = graph.op("slice", [graph.outputs["y"]], {"axis": 2, "start": 1, "stop": 3})
    assert mismatch(graph, op("slice", X, axis=2, stop=3)).reason == "`slice` has start=1, not 0"
    assert isinstance(match(op("slice", X, axis=2, start=1, stop=attr("n")), graph.outputs["y"].node), Match)


def test_operands_are_counted():
    graph = spelled_out()
    assert mismatch(graph, op("mul", X)).reason == "`mul` has 2 operands, not 1"
    assert mismatch(graph, op("mul", X, None)).reason == "`mul` has an operand that should be absent"
    assert mismatch(graph, op("mul", op("silu|gelu", X), W)).reason == "expected `silu` or `gelu`, found no operation"


def test_a_private_result_must_not_be_used_elsewhere():
    graph = spelled_out()
    inner = op("mul", X, op("rsqrt", var("shifted"), private=True))
    assert isinstance(match(op("mul", W, inner), graph.outputs["y"].node), Match)
    graph.outputs["z"] = graph.op("exp", [graph.nodes_named("rsqrt")[0].output])
    found = mismatch(graph, op("mul", W, inner))
    assert found.reason == "the result of `rsqrt` is used elsewhere too"
    assert found.where.op.name == "rsqrt"


def test_an_output_of_several_is_matched_by_its_number():
    graph = Graph("top")
    x = graph.add_input("x", TensorType(torch.float32, (4,)))
    first = graph.append("topk", [x], {"count": 2})
    graph.outputs["y"] = graph.op("cast", [first.outputs[1]], {"dtype": torch.float32})
    pattern = op("cast", op("topk", X, count=attr("count"), output=1), dtype=torch.float32)
    assert isinstance(match(pattern, graph.outputs["y"].node), Match)
    assert mismatch(graph, op("cast", op("topk", X, count=2), dtype=torch.float32)).reason.startswith("expected `topk`")


def test_refusals_and_near_misses_are_reported_with_reason_and_place():
    refused = rewrite(spelled_out(shape=(1, 4)), {"mul": (norm,)})
    assert [(r.rule, r.scope, r.op, r.reason) for r in refused.refused] == [
        ("norm", "n", "mul", "the weight is no vector")
    ]
    graph = spelled_out()
    graph.nodes_named("mean")[0].attrs["axes"] = (1,)
    graph.nodes_named("mean")[0].output.type = TensorType(torch.float32, ("B", 1, 4))
    near = rewrite(graph, {"mul": (norm,)}).refused
    assert [(r.rule, r.op, r.reason) for r in near] == [("norm", "mean", "`mean` has axes=(1,), not (2,)")]


def test_rules_run_until_nothing_changes():
    graph = Graph("chain")
    x = value = graph.add_input("x", TensorType(torch.float32, (4,)))
    for _ in range(9):
        value = graph.op("neg", [value])
    graph.outputs["y"] = value
    outcome = rewrite(graph, {"neg": (double_negation,)})
    assert [node.op.name for node in graph.nodes] == ["neg"]
    assert next(graph.nodes).input(0) is x
    assert outcome.applied["double_negation"] >= 4


def test_what_is_computed_twice_in_one_scope_is_merged():
    graph = Graph("twice")
    x = graph.add_input("x", TensorType(torch.float32, (4,)))
    doubled = [graph.op("neg", [graph.op("neg", [graph.op("exp", [x], scope=scope)])]) for scope in ("a", "a", "b")]
    graph.outputs["y"] = graph.op("add", [graph.op("add", doubled[:2]), doubled[2]])
    rewrite(graph, {"neg": (double_negation,)})
    assert [(node.op.name, node.scope) for node in graph.nodes_named("exp")] == [("exp", "a"), ("exp", "b")]


def test_a_rule_must_keep_the_type():
    @rule(op("neg", X))
    def to_integers(site: Site, found: Match) -> Value:
        return site.op("cast", found.value("x"), dtype=torch.int64)

    graph = Graph("types")
    x = graph.add_input("x", TensorType(torch.float32, (4,)))
    graph.outputs["y"] = graph.op("neg", [x], scope="here")
    with pytest.raises(VerifyError) as raised:
        rewrite(graph, {"neg": (to_integers,)})
    assert raised.value.cause == "rule `to_integers` replaces f32[4] by i64[4]"
    assert raised.value.where == "here"


def test_a_pattern_that_names_an_unknown_attribute_is_a_mistake():
    with pytest.raises(ValueError, match="`mul` has no attribute scalr"):
        match(op("mul", W, var("y"), scalr=2.0), spelled_out().outputs["y"].node)
