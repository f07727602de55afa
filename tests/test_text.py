"""Graph text: what is printed parses to the same graph, folded or not, and mistakes in a text are located."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.errors import TextError, UsageError
from compiler.ir.graph import Graph, Value
from compiler.ir.layers import segments
from compiler.ir.text import difference, equal, parse_graph, print_graph
from compiler.ir.types import TensorType
from compiler.ir.verify import verify
from compiler.weights.expr import Expr, apply, load
from tests.families import FAMILIES
from tests.graphs import tiny_llama

GOLDEN = Path(__file__).parent / "golden"


def round_trips(graph: Graph) -> None:
    for weights in (False, True):
        for fold in (False, True):
            parsed = parse_graph(print_graph(graph, weights=weights, fold=fold))
            verify(parsed)
            assert difference(graph, parsed, weights=weights) is None
            assert print_graph(parsed, weights=weights, fold=fold) == print_graph(graph, weights=weights, fold=fold)


# --- random graphs -------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["", "model", "model.norm", "model.layers.0.a", "model.layers.1.a", "model.layers.1.b.3", "9"])
WIDTH = 4


@st.composite
def expressions(draw, depth: int = 2) -> Expr:
    key = draw(st.text(min_size=1, max_size=12))
    leaf = load(
        draw(st.sampled_from(["model", "spill"])),
        key,
        TensorType(draw(st.sampled_from([torch.float32, torch.bfloat16])), (WIDTH, WIDTH)),
    )
    if not depth:
        return leaf
    inner = draw(expressions(depth - 1))
    match draw(st.sampled_from(["leaf", "scale", "transpose", "add", "cast", "halves", "full"])):
        case "scale":
            return apply("scale", [inner], {"by": draw(st.floats(allow_nan=False))})
        case "transpose":
            return apply("transpose", [inner], {"perm": (1, 0)})
        case "add":
            return apply("add", [inner, inner])
        case "cast":
            return apply("cast", [inner], {"dtype": torch.float16})
        case "halves":
            halves = [apply("slice", [inner], {"axis": 0, "start": s, "stop": s + 2}) for s in (2, 0)]
            return apply("concat", halves, {"axis": 0})
        case "full":
            return apply("full", [], {"shape": (WIDTH, WIDTH), "value": 0.1, "dtype": torch.float32})
        case _:
            return leaf


@st.composite
def graphs(draw) -> Graph:
    graph = Graph(draw(st.text(max_size=8)))
    x = graph.add_input(draw(st.sampled_from(["x", "input_ids", "a b"])), TensorType(torch.float32, ("B", "T", WIDTH)))
    values: list[Value] = [x]
    pick = lambda: values[draw(st.integers(0, len(values) - 1))]  # noqa: E731
    for index in range(draw(st.integers(0, 12))):
        scope = draw(NAMES)
        match draw(st.sampled_from(["linear", "rms_norm", "add", "scalar", "gelu", "reshape", "topk", "tied"])):
            case "linear":
                weight = graph.add_param(f"{scope}.w{index}".lstrip("."), draw(expressions()))
                weight.persistent = draw(st.booleans())
                weight.aliases = draw(st.sampled_from([(), (f"alias{index}.1.x",)]))
                weight.storage = draw(st.sampled_from([weight.storage, torch.float16]))
                node = graph.append("linear", [pick(), weight], scope=scope)
            case "tied" if graph.params:
                node = graph.append("linear", [pick(), next(iter(graph.params.values()))], scope=scope)
            case "rms_norm":
                node = graph.append("rms_norm", [pick()], {"eps": draw(st.floats(0, 1)), "offset": 1.0}, scope=scope)
            case "add":
                node = graph.append("add", [pick(), pick()], scope=scope)
            case "scalar":
                scalar = draw(st.floats(allow_nan=False))
                node = graph.append("mul", [pick()], {"scalar": scalar}, scope=scope)
            case "reshape":
                flat = graph.op("reshape", [pick()], {"shape": ("B*T", WIDTH)}, scope=scope)
                node = graph.append("reshape", [flat], {"shape": ("B", "T", WIDTH)}, scope=draw(NAMES))
            case "topk":
                node = graph.append("topk", [pick()], {"count": WIDTH}, scope=scope)
            case _:
                node = graph.append(
                    "gelu", [pick()], {"approximate": draw(st.sampled_from(["none", "tanh"]))}, scope=scope
                )
        values.append(node.outputs[0])
    for index in range(draw(st.integers(1, 2))):
        graph.outputs[f"out{index}"] = pick()
    return graph


@given(graphs())
@settings(max_examples=150, deadline=None)
def test_parse_inverts_print(graph):
    round_trips(graph)


@given(st.integers(1, 7), st.booleans(), st.integers(1, 3), st.data())
@settings(max_examples=40, deadline=None)
def test_parse_inverts_print_on_layers_that_differ_here_and_there(layers, bias, period, data):
    graph = tiny_llama(layers, bias=bias)
    nodes = list(graph.nodes)
    changed = data.draw(st.sampled_from(nodes))
    for index, node in enumerate(graph.nodes_named("attention")):
        if index % period == 1:
            node.attrs["window"] = 2
    match data.draw(st.sampled_from(["nothing", "attr", "expr", "output", "insert", "scope"])):
        case "attr" if "eps" in changed.attrs:
            changed.attrs["eps"] = 0.5
        case "expr":
            param = data.draw(st.sampled_from(list(graph.params.values())))
            param.expr = apply("scale", [param.expr], {"by": 0.5})
        case "output":
            graph.outputs["extra"] = changed.outputs[0]
        case "insert":
            value = changed.outputs[0]
            users = list(value.users)
            made = graph.append(
                "mul", [value], {"scalar": 2.0}, scope=changed.scope, before=users[0] if users else None
            )
            for user in users:
                graph.set_input(user, user.inputs.index(value), made.output)
        case "scope":
            changed.scope = "elsewhere"
        case _:
            pass
    round_trips(graph)


# --- folding -------------------------------------------------------------------------------------------------


def test_identical_layers_fold_to_one():
    text = print_graph(tiny_llama(layers=30))
    assert "repeat i in 0..30 at model.layers.{i}" in text
    assert text.count("attention(") == 1
    assert len(text.splitlines()) == len(print_graph(tiny_llama(layers=2)).splitlines())


def test_alternating_layers_fold_to_one_of_each():
    graph = tiny_llama(layers=9)
    for index, node in enumerate(graph.nodes_named("attention")):
        if index % 3:
            node.attrs["window"] = index % 3
    for weights in (False, True):
        text = print_graph(graph, weights=weights)
        assert text.count("attention(") == 3
        assert "repeat i in 0..9 step 3 (" in text
        assert "at model.layers.{i+2} {" in text
    assert 'load("model", "model.layers.{i+1}.mlp.up_proj.weight")' in text
    round_trips(graph)


def test_an_exception_among_layers_stands_alone():
    graph = tiny_llama(layers=8)
    graph.nodes_named("attention")[5].attrs["window"] = 4
    heads = [line.strip().split(" (")[0] for line in print_graph(graph).splitlines() if "{" in line and " at m" in line]
    assert heads[-3:] == [
        "repeat i in 0..5 at model.layers.{i}",
        "at model.layers.5 {",
        "repeat i in 6..8 at model.layers.{i}",
    ]
    round_trips(graph)


def test_folding_can_be_switched_off():
    assert print_graph(tiny_llama(layers=3), fold=False).count("attention(") == 3


def test_layers_that_differ_in_their_weights_fold_only_without_weights():
    graph = tiny_llama(layers=4)
    param = graph.params["model.layers.2.mlp.up_proj.weight"]
    param.expr = apply("scale", [param.expr], {"by": 0.5})
    assert print_graph(graph).count("attention(") == 1
    assert print_graph(graph, weights=True).count("attention(") == 3
    round_trips(graph)


def test_a_layer_whose_result_is_an_output_ends_a_run():
    graph = tiny_llama(layers=5)
    second = [node for node in graph.nodes if node.scope.startswith("model.layers.1")]
    graph.outputs["early"] = second[-1].output
    text = print_graph(graph)
    assert "repeat i in 0..2" in text
    assert "repeat i in 2..5" in text
    round_trips(graph)


def test_one_layer_is_shown_as_a_graph_of_its_own():
    graph = tiny_llama(layers=4)
    text = print_graph(graph, layer=2)
    part = parse_graph(text)
    verify(part)
    assert [layer.scope for layer, _ in segments(part) if layer] == ["model.layers.2"]
    assert len(part) == 20
    assert list(part.inputs) == ["x0", "x1", "x2"]
    with pytest.raises(UsageError, match="no layer 7"):
        print_graph(graph, layer=7)


@pytest.mark.parametrize("name", FAMILIES)
def test_parse_inverts_print_on_every_family(captured, name):
    round_trips(captured(name))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "mixtral", "deepseek_v3"])
def test_golden_text_of_families(captured, golden, name):
    golden(GOLDEN / f"{name}.mir", print_graph(captured(name)))


def test_golden_text_with_weights(golden):
    graph = tiny_llama(layers=3)
    for index in range(3):
        param = graph.params[f"model.layers.{index}.mlp.up_proj.weight"]
        half = apply("slice", [param.expr], {"axis": 0, "start": 0, "stop": 12})
        param.expr = apply("concat", [half, apply("scale", [half], {"by": 0.5})], {"axis": 0})
    golden(GOLDEN / "weights.mir", print_graph(graph, weights=True))
    golden(GOLDEN / "layer.mir", print_graph(graph, layer=1))


# --- comparison ----------------------------------------------------------------------------------------------


def test_difference_names_what_differs():
    left, right = tiny_llama(), tiny_llama()
    assert equal(left, right)
    right.params["model.norm.weight"].storage = torch.float16
    assert equal(left, right, weights=False)
    assert difference(left, right) == "parameter model.norm.weight is stored differently"
    right.nodes_named("rms_norm")[0].attrs["eps"] = 0.5
    assert "rms_norm in model.layers.0.input_layernorm has attributes" in str(difference(left, right, weights=False))
    assert "are in one only" in str(difference(tiny_llama(2), tiny_llama(3)))


# --- errors --------------------------------------------------------------------------------------------------

SOUND = """\
graph m(x: f32[B,4]) {
  %0 = linear(x, @w: f32[4,4]) : f32[B,4] at .
  %1 = rms_norm(%0) {eps=0.5} : f32[B,4]
  return y=%1
}
"""


def test_the_sound_text_parses():
    assert len(parse_graph(SOUND)) == 2


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "cause"),
    [
        ("graph m", "grph m", 1, 1, "expected `graph`"),
        ("f32[B,4])", "f33[B,4])", 1, 12, "unknown dtype `f33`"),
        ("linear(x", "liner(x", 2, 8, "unknown operation `liner`"),
        ("linear(x", "linear(z", 2, 15, "`z` is not defined above"),
        ("@w: f32[4,4]", "@w: f32[4,5]", 2, 8, "input widths differ: 4 and 5"),
        (": f32[B,4] at .", ": f32[B,5] at .", 2, 34, "`linear` gives 1 values: f32[B,4]"),
        ("{eps=0.5}", "{epz=0.5}", 3, 22, "`rms_norm` has no attribute `epz`"),
        ("{eps=0.5}", "{eps=half}", 3, 26, "`half` is no value"),
        ("{eps=0.5}", '{eps="a"}', 3, 8, "`rms_norm` attribute `eps` must be float, not 'a'"),
        (" {eps=0.5}", "", 3, 8, "`rms_norm` needs the attribute `eps`"),
        ("{eps=0.5}", "{eps=0.5", 3, 30, "expected `,`"),
        ("return y=%1", "return y=%7", 4, 12, "`%7` is not defined above"),
        ("  return y=%1\n", "", 4, 1, "the graph should end with `return` and `}`"),
        ("y=%1\n}", "y=%1\n} x", 5, 3, "the line should end here"),
        ("(x: f32", "(x: f32[1;2], y: f32", 1, 16, "expected a dim"),
        ("  %1 =", "  @w: f32[2]\n  %1 =", 3, 3, "parameter `w` is declared twice"),
        ("(%0)", "(%0, @w: f32[2])", 3, 21, "parameter `w` is f32[4,4] above"),
        ("  %1 =", "  at model.layers.0 {\n  %1 =", 3, 3, "this block is never closed"),
        ("  %1 =", "  }\n  %1 =", 3, 3, "this closes nothing"),
        (
            "  %1 =",
            "  repeat i in 0..2 at h.{i} (%5 = %0 then %9) {\n  }\n  %1 =",
            3,
            48,
            "`%9` is not defined in the block",
        ),
        ("  %1 =", "  repeat i in 0..2 step 0 at h.{i} {\n  }\n  %1 =", 3, 37, "the step must be at least 1"),
        ("  %0 =", "  @v: f32[2] = dream(3)\n  %0 =", 2, 22, "expected a weight expression"),
    ],
)
def test_mistakes_are_located(old, new, line, column, cause):
    assert old in SOUND
    with pytest.raises(TextError) as raised:
        parse_graph(SOUND.replace(old, new, 1), Path("bad.mir"))
    span = raised.value.span
    assert span is not None
    assert cause in raised.value.cause
    assert (span.line, span.column) == (line, column)


@given(st.text(alphabet=st.sampled_from(list('graph m(x:f32[B,4])={}%01@$."\n at repeat i in..then,return'))))
@settings(max_examples=200, deadline=None)
def test_any_text_parses_or_is_a_text_error(text):
    for candidate in (text, f"graph m(x: f32[B,4]) {{\n{text}\n  return y=x\n}}"):
        try:
            verify(parse_graph(candidate))
        except TextError as error:
            assert error.span is not None


def test_numbers_survive():
    graph = Graph("m")
    x = graph.add_input("x", TensorType(torch.float32, (1,)))
    for scalar in (math.inf, -math.inf, 1e-300, 0.1, 3.0, -0.0):
        x = graph.op("mul", [x], {"scalar": scalar})
    graph.outputs["y"] = x
    parsed = [node.attrs["scalar"] for node in parse_graph(print_graph(graph)).nodes]
    assert [repr(value) for value in parsed] == ["inf", "-inf", "1e-300", "0.1", "3.0", "-0.0"]
