"""Quantised weights in ONNX: the codes that a graph multiplies by are those that ONNX Runtime multiplies by."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.onnx import Runner, emit, propose, verify
from backends.onnx.check import PROMPT, empty_cache, session
from backends.onnx.quantised import unsigned_bytes
from compiler.errors import TargetError
from compiler.frontend.capture import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.types import TensorType
from compiler.pipeline import Pipeline
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import load
from compiler.weights.ops.quant import quantise
from compiler.weights.source import MemorySource
from passes import Quantize, Rotate
from tests.captures import graph_of, plan_of
from tests.families import FAMILIES
from tests.test_onnx import Session

ROWS, EPS = 24, torch.finfo(torch.float32).eps


def one_product(width: int, bits: int, group: int, symmetric: bool, *, table: bool = False) -> Graph:
    """A graph of one product with a quantised weight [24, width], or of a look-up in it."""
    graph = Graph("product")
    weight = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(bits + group))
    graph.sources["model"] = MemorySource({"weight": weight, "bias": weight[:, 0].clone()})
    stored = load("model", "weight", TensorType(torch.float32, (ROWS, width)))
    made = quantise(stored, bits, group, symmetric=symmetric, scale_dtype=torch.float32)
    param = graph.add_param("part.weight", made, torch.float32)
    if table:
        ids = graph.add_input("ids", TensorType(torch.int64, ("B", "T")))
        graph.outputs["y"] = graph.op("embedding", [param, ids], scope="part")
        return graph
    bias = graph.add_param("part.bias", load("model", "bias", TensorType(torch.float32, (ROWS,))))
    x = graph.add_input("x", TensorType(torch.float32, ("B", "T", width)))
    graph.outputs["y"] = graph.op("linear", [x, param, bias], scope="part")
    return graph


def computed(graph: Graph, directory, given_inputs, target: str = "ort-cpu", accuracy: int = 0):
    emission = propose(graph, target, accuracy=accuracy)
    emit(emission, graph.sources, directory)
    onnx.checker.check_model(directory / "model.onnx", full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(directory / "model.onnx", options)
    (found,) = session.run(None, {name: value.numpy() for name, value in given_inputs.items()})
    return torch.from_numpy(found), emission


FORMS = [
    (width, bits, group, symmetric)
    for width, group in ((64, 16), (64, 32), (96, 32), (128, 128), (192, 0), (96, 48))
    for bits in (2, 3, 4, 5, 8)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_product_with_codes_is_that_with_their_values(form, target, tmp_path):
    width, *_ = form
    graph = one_product(*form)
    inputs = {"x": torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1))}
    expected = run(graph, inputs)["y"]
    found, emission = computed(graph, tmp_path, inputs, target)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 8 * EPS * width**0.5
    dense = ROWS * width * 4
    assert emission.nbytes < dense


@pytest.mark.parametrize(
    "form", [(64, 4, 32, True), (64, 4, 32, False), (64, 8, 16, True), (96, 2, 32, False)], ids=str
)
def test_a_quantised_table_is_looked_up_in_its_codes(form, tmp_path):
    graph = one_product(*form, table=True)
    inputs = {"ids": torch.tensor([[0, 5, 23], [7, 7, 1]])}
    found, emission = computed(graph, tmp_path, inputs)
    assert torch.allclose(found, run(graph, inputs)["y"], rtol=4 * EPS, atol=1e-6)
    assert emission.models["model.onnx"].operations("com.microsoft") == ["GatherBlockQuantized"]


def test_inputs_rounded_to_int8_cost_about_a_hundredth(tmp_path):
    graph = one_product(128, 4, 32, True)
    inputs = {"x": torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1))}
    expected = run(graph, inputs)["y"]
    found, emission = computed(graph, tmp_path, inputs, accuracy=4)
    assert emission.rounds_inputs and not emission.exact().rounds_inputs
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.02


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from((2, 4, 8)), st.integers(0, 99))
def test_bytes_hold_codes_in_order(rows, count, bits, seed):
    low = -(1 << (bits - 1))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, -low, (rows, count), generator=generator, dtype=torch.int8)
    source = {"codes": MemorySource({"codes": codes})}
    expr = unsigned_bytes(load("codes", "codes", TensorType(torch.int8, (rows, count))), bits)
    (packed,) = evaluate([expr], source)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-count * bits // 8))
    every = np.unpackbits(packed.numpy(), axis=1, bitorder="little")[:, : count * bits].reshape(rows, count, bits)
    values = (every * (1 << np.arange(bits))).sum(-1) + low
    assert np.array_equal(values, codes.numpy())


SIZES = {
    "llama": {"head_dim": 16},
    "bert": {},
    "deepseek_v3": {"q_lora_rank": 32, "v_head_dim": 12, "moe_intermediate_size": 32},
}


@pytest.mark.parametrize("name", SIZES)
def test_a_quantised_model_is_its_graph(name, tmp_path):
    """Weights of bfloat16 storage, so that products of codes and scales are not rounded as a checkpoint's would be."""
    model = FAMILIES[name].build(3, hidden_size=64, intermediate_size=96, **SIZES[name]).to(torch.bfloat16)
    graph = capture(model)
    Pipeline([Quantize(bits=4, group=16, tied="copy")]).run(graph)
    emission = propose(graph)
    emit(emission, graph.sources, tmp_path)
    found = verify(emission, tmp_path)
    assert found.holds and found.rounded is not None and found.rounded > found.error


def computed_in_one_step(kind, given, directory):
    graph, width = Graph("rounding"), int(given.shape[-1])
    graph.sources["model"] = MemorySource({"bias": torch.zeros(width)})
    bias = graph.add_param("part.bias", load("model", "bias", TensorType(torch.float32, (width,))))
    x = graph.add_input("x", TensorType(torch.float32, ("B", "T", width)))
    graph.outputs["y"] = graph.op("add", [graph.op("fake_quantize", [x], kind, scope="part"), bias], scope="part")
    return run(graph, {"x": given})["y"], computed(graph, directory, {"x": given}, "onnx")[0]


@pytest.mark.parametrize("scale", [0.0, 0.03])
@pytest.mark.parametrize("kind", [{"type": "int"}, {"type": "int", "bits": 4}, {"type": "fp8"}], ids=str)
def test_activations_are_rounded_to_the_same_values(kind, scale, tmp_path):
    """To the bit, of the same activations: halves, zeros and clipped ones too."""
    given = torch.randn(3, 50, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 50)[:, None]
    given[0, 0], given[0, 1, 0] = 0.0, -9.0
    ours, theirs = computed_in_one_step({**kind, "scale": scale}, given, tmp_path)
    assert torch.equal(theirs, ours)


def test_a_largest_negative_element_lies_between_two_codes(tmp_path):
    """Why whole models cannot be compared so: the last bit of such an element decides which of the two it becomes."""
    given = -torch.linspace(0.5, 1.5, 1000).reshape(1, 1000, 1)
    _, found = computed_in_one_step({"type": "int"}, given, tmp_path)
    codes = (found / (given.abs() / 127.5)).round().unique()
    assert codes.tolist() == [-128.0, -127.0]


def rounding(name):
    calibration = [FAMILIES[name].inputs(seed=1)]
    return lambda _: calibration


ROUNDED = {
    "activations": ("llama", {"head_dim": 16}, [Quantize(activations="int8")]),
    "of an encoder and a decoder": ("t5", {}, [Quantize(activations="int8")]),
    "of tokens sent to experts": ("mixtral", {}, [Quantize(type="fp8", activations="fp8")]),
    "in scales that were measured": ("bert", {}, [Quantize(activations="int8", activation_scale="static")]),
    "after rotation": (
        "mistral",
        {},
        [Rotate(what=("values", "stream", "mlp")), Quantize(bits=4, group=16, activations="int8")],
    ),
    "caches of eight bits": ("llama", {"head_dim": 16}, [Quantize(bits=8, cache="int8")]),
    "caches of floats": ("qwen2", {}, [Quantize(bits=4, group=16, activations="int8", cache="fp8")]),
}


@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
@pytest.mark.parametrize("kind", ROUNDED)
def test_a_model_that_rounds_activations_is_its_graph(kind, target, tmp_path):
    """Without rounding to the last bits; with it no farther than rounding goes. Whole, by tokens, with padding."""
    name, changes, passes = ROUNDED[kind]
    graph = graph_of(name, **changes)
    Pipeline(passes).run(graph, calibration=rounding(name))
    emission = propose(graph, target)
    emit(emission, graph.sources, tmp_path)
    found = verify(emission, tmp_path)
    assert found.error <= found.tolerance and found.rounded is not None
    assert found.rounded <= found.bound <= 1.0
    assert not list(tmp_path.glob(".exact.*"))


CACHED = {
    "llama": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gpt_oss": {"head_dim": 16},
}
"""Plain, in windows with bent scores, with sinks."""


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_of_eight_bits_holds_the_codes_of_its_graph(name, tmp_path):
    """Codes where the graph rounds keys and values, in place; nothing else is rounded, so that they decide alike."""
    graph = graph_of(name, **CACHED[name])
    for node in graph.nodes_named("attention"):
        for operand in (1, 2):
            x = graph.op("fake_quantize", [node.input(operand)], {"type": "int", "scale": 2.0**-8}, before=node)
            graph.set_input(node, operand, x)
    emission = propose(graph)
    (model,) = emission.models.values()
    assert {value.dtype.name for value in model.inputs if value.name.startswith("past")} == {"INT8"}
    assert model.in_place and emission.loads_in[0].startswith("ONNX Runtime 1.31 or later")
    emit(emission, graph.sources, tmp_path)
    assert verify(emission, tmp_path).holds  # with padding, too, which turns keys, and so their codes
    ids = FAMILIES[name].inputs(batch=2, tokens=7)["input_ids"]
    logits = run(graph, {"input_ids": ids})["logits"]
    for start in (7, 4):
        assert _worst(tmp_path / "model.onnx", ids, logits, start) <= 64 * EPS


def _worst(path, ids, logits, start):
    """How far logits are apart, over the largest: of a prompt of ``start`` tokens, and of each token after it."""
    model, ones = session(path), np.ones_like(ids.numpy())
    given, errors = empty_cache(model, len(ids)), []
    for first, last in [(0, start), *((place, place + 1) for place in range(start, ids.shape[1]))]:
        feeds = {"input_ids": ids[:, first:last].numpy(), "attention_mask": ones[:, :last], **given}
        names = [value.name for value in model.get_outputs()]
        found, *past = model.run(names, feeds)
        given = {name.replace("present", "past_key_values"): x for name, x in zip(names[1:], past, strict=True)}
        errors.append(float((torch.from_numpy(found) - logits[:, first:last]).abs().max() / logits.abs().max()))
    return max(errors)


EXPERTS = {
    "mixtral": ({"hidden_size": 32, "intermediate_size": 48}, {}),
    "gpt_oss": ({"head_dim": 16}, {}),
    "with zero points": ({"hidden_size": 32, "intermediate_size": 48}, {"symmetric": False}),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_multiply_by_their_codes(kind, tmp_path):
    """Plain and clamped gates, with biases and without; nothing of them is written dense."""
    changes, options = EXPERTS[kind]
    graph = graph_of(kind if kind in FAMILIES else "mixtral", 3, **changes)
    Pipeline([Quantize(bits=4, group=16, tied="copy", **options)]).run(graph)
    emission = propose(graph)
    assert "QMoE" in emission.models["model.onnx"].operations("com.microsoft") and not emission.notes
    emit(emission, graph.sources, tmp_path)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    found = verify(emission, tmp_path)
    assert found.error <= found.tolerance and found.rounded <= found.bound


def test_rotated_weights_are_multiplied_by_rotated_activations(tmp_path):
    graph = graph_of("phi3")
    Pipeline([Rotate(what=("values", "mlp"))]).run(graph)
    assert graph.nodes_named("hadamard")
    emission = propose(graph)
    emit(emission, graph.sources, tmp_path)
    assert verify(emission, tmp_path).holds


@pytest.mark.parametrize(("name", "count"), [("llama", 14), ("mixtral", 12)])
def test_a_report_says_which_codes_are_lost(name, count):
    """Of floats all: of projections that are joined, of experts."""
    graph = plan_of(name, head_dim=16)
    Pipeline([Quantize(type="fp8", skip=("lm_head*",))]).run(graph, planned=True)
    (note,) = propose(graph).notes
    assert (
        note
        == f"quantised weights are written dense, in float32: nothing multiplies by their codes there ({count} times)"
    )


def test_weights_of_several_widths_with_zero_points_are_their_graph(tmp_path):
    graph = graph_of("llama", head_dim=16)
    step = Quantize(bits=4, widths=(2, 4, 8), group=16, symmetric=False)
    Pipeline([step]).run(graph, calibration=rounding("llama"))
    emission = propose(graph, "onnx")
    emit(emission, graph.sources, tmp_path)
    assert verify(emission, tmp_path).holds


TOKENS = 11  # after which no two tokens are so nearly as likely that rounding would pick one
PROMPTED = {"plain": {}, "cached as int8": {"cache": "int8"}, "with zero points": {"symmetric": False}}


@pytest.mark.parametrize("kind", PROMPTED)
def test_a_model_for_prompts_goes_on_in_the_one_for_tokens(kind, tmp_path):
    """The model for tokens takes over what that for prompts has cached, and both are within rounding of the graph."""
    graph = graph_of("llama", 3, head_dim=16)
    Pipeline([Quantize(bits=4, group=16, tied="copy", **PROMPTED[kind])]).run(graph, calibration=rounding("llama"))
    emission = propose(graph, prompts="int8")
    prompt = emission.models[PROMPT]
    assert "MatMulIntegerToFloat" in prompt.operations("com.microsoft")
    assert prompt.operations("com.microsoft").count("MatMulNBits") == 1  # the head, of which one token is wanted
    emit(emission, graph.sources, tmp_path)
    onnx.checker.check_model(tmp_path / PROMPT, full_check=True)
    assert verify(emission, tmp_path).holds
    ids = FAMILIES["llama"].inputs(batch=1, tokens=TOKENS)["input_ids"]
    runner = Runner(tmp_path / "model.onnx", threads=1)
    exact = run(graph, {"input_ids": ids})["logits"].numpy()
    assert np.abs(runner.logits(ids.numpy()) - exact).max() <= 0.25 * np.abs(exact).max()
    (first, _), (second, _) = runner.greedy(ids[0].tolist(), 2)
    alone = Session(tmp_path / "model.onnx")
    found, past = alone.step(ids, torch.ones_like(ids))
    assert first == int(found[0, -1].argmax())
    following = alone.step(torch.tensor([[first]]), torch.ones(1, TOKENS + 1, dtype=torch.int64), past)[0]
    assert second == int(following[0, -1].argmax())


@pytest.mark.parametrize(("target", "name"), [("genai", "llama"), ("onnx", "llama"), ("ort-cpu", "bert")])
def test_prompts_of_their_own_are_for_language_models_on_a_cpu(target, name):
    with pytest.raises(TargetError, match="prompts: int8"):
        propose(graph_of(name), target, prompts="int8")


def test_prompts_of_int8_exclude_inputs_as_they_are():
    graph = graph_of("llama", head_dim=16)
    Pipeline([Quantize(bits=4, group=16)]).run(graph)
    with pytest.raises(TargetError, match="accuracy-level"):
        propose(graph, accuracy=0, prompts="int8")


def test_a_dense_model_has_no_prompts_of_int8():
    with pytest.raises(TargetError, match="quantised weights"):
        propose(graph_of("llama"), prompts="int8")


def test_products_of_one_input_are_one(tmp_path):
    """A gate and what it multiplies; not where their schemes differ."""
    graph = graph_of("llama", head_dim=16)
    Pipeline([Quantize(bits=4, group=16, tied="copy")]).run(graph)
    nodes = propose(graph).models["model.onnx"].nodes
    layers = len(graph.nodes_named("attention"))
    assert [node.op_type for node in nodes].count("MatMulNBits") == 4 * layers + 1
    apart = graph_of("llama", head_dim=16)
    steps = [Quantize(where="mlp.gate", bits=8, group=16), Quantize(where="mlp.up", bits=4, group=16)]
    Pipeline(steps).run(apart)
    assert not [node for node in propose(apart).models["model.onnx"].nodes if node.op_type == "Split"]
