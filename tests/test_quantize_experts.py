"""Experts of one stack that differ in width: shared out within the budget, never for the worse, and written as such."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from backends.onnx import propose as onnx_model
from backends.safetensors.emission import Refusal, propose
from backends.torch_module import kernel_calls
from compiler.calibration.moments import measure
from compiler.calibration.products import products
from compiler.errors import PassError, TargetError
from compiler.ir.execute import run
from compiler.pipeline import Pipeline
from compiler.target import emission_of, gptq_emission
from compiler.weights.evaluate import evaluate
from compiler.weights.ops import take
from compiler.weights.ops.integer import Integer
from compiler.weights.spill import Progress
from passes import Quantize
from passes.quantize.experts import Experts, bits_of
from passes.quantize.mixed import APART, Data, least, predicted, total, whole
from tests.captures import graph_of, plan_of
from tests.families import FAMILIES
from tests.test_generated import error, tolerance, written
from tests.test_quantize_calibrated import quantised
from tests.test_sparsify import batches

MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2"]
WIDTHS = (2, 3, 4, 5, 6, 8)


class Reading:
    """As much of a pass's context as losses are predicted by."""

    progress = Progress()

    def __init__(self, graph):
        self._graph = graph

    def read(self, param):
        return evaluate([param.expr], self._graph.sources)[0]


def losses_of(name, *, solved, data=None):
    graph = graph_of(name)
    params = [param for param in products(graph) if param.type.rank == 3 or "o_proj" in param.name]
    codec_of = lambda param, width: Integer(width, 0, param.storage)  # noqa: E731
    data = data or Data.of(batches(name, 3, 12))
    return graph, predicted(graph, Reading(graph), params, data, WIDTHS, codec_of, solved=solved)


@pytest.mark.parametrize(("name", "solved"), [("mixtral", False), *((name, True) for name in MIXTURES)])
def test_experts_apart_never_lose_at_the_same_bytes(name, solved):
    """To stacks of one width each, nor these to one width for all, in what is predicted, which is what is minimised."""
    _, losses = losses_of(name, solved=solved)
    alike = whole(losses)
    assert len(losses) > len(alike)
    for bits in (2.5, 3, 4.2):
        apart, stacks = least(losses, bits, WIDTHS, WIDTHS), least(alike, bits, WIDTHS, WIDTHS)
        for way in (apart, stacks):
            assert sum(width * matrix.size for matrix, width in way.items()) <= bits * sum(m.size for m in way)
        assert total(losses, WIDTHS, apart) <= total(alike, WIDTHS, stacks) * (1 + 1e-9)
        if bits in WIDTHS:
            assert total(alike, WIDTHS, stacks) <= total(alike, WIDTHS, dict.fromkeys(stacks, bits)) * (1 + 1e-9)
    assert any(isinstance(width, tuple) for width in bits_of(apart).values())


def test_experts_count_by_how_often_they_are_chosen():
    """And one that calibration data does not choose for a little, not for nothing."""
    data = [FAMILIES["qwen3_moe"].inputs(batch=1, tokens=tokens, seed=1) for tokens in (2, 9)]
    unseen = 0
    for given in data:
        graph, losses = losses_of("qwen3_moe", solved=False, data=Data([given], [given]))
        for stack in {group[0].param for group in losses if group[0].expert is not None}:
            counts = measure(graph, [stack], [given], Progress()).of(stack).count
            own = torch.tensor([losses[group][0] for group in losses if group[0].param is stack])
            unseen += int((counts == 0).sum())
            assert (own > 0).all()
            assert given is data[0] or torch.corrcoef(torch.stack([own.double(), counts]))[0, 1] > 0.5
    assert unseen


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_what_is_chosen_is_within_the_budget_and_nearest_on_windows_held_out(method):
    graph, report, _ = quantised("mixtral", where="experts", bits=2.5, group=8, experts="apart", method=method)
    distances = {trial.what: trial.distance for trial in report.trials}
    (chosen,) = (trial for trial in report.trials if trial.chosen)
    assert chosen.distance == min(distances.values()) and APART in distances
    used = size = 0
    for param in graph.params.values():
        if param.expr.op.startswith("dequantize"):
            own = param.expr.attr("bits")
            used += param.type.numel * (own if isinstance(own, int) else sum(own) / len(own))
            size += param.type.numel
    assert used <= 2.5 * size
    assert any("experts.gate_up_proj[3]" in curve.scope for curve in report.curves)
    apart = [param for param in graph.params.values() if param.expr.op == "dequantize_experts"]
    assert bool(apart) == (chosen.what == APART)


@pytest.fixture(scope="module", params=[("mixtral", True), ("mixtral", False), ("gpt_oss", True)], ids=str)
def apart(request):
    """A family, and its graph whose experts have widths of their own, to nearest."""
    name, symmetric = request.param
    graph = graph_of(name)
    for index, node in enumerate(graph.nodes_named("experts")):
        for place, widths in ((3, (4, 2, 3, 2)), (4, (3, 3, 8, 2) if index else (3, 3, 3, 3))):
            param = node.input(place)
            codecs = Experts(tuple(Integer(bits, 8, param.storage, symmetric) for bits in widths))
            param.expr = codecs.nearest(param.expr)
    return name, graph


def test_a_generated_module_holds_them(apart, tmp_path):
    name, graph = apart
    given = FAMILIES[name].inputs(batch=2, tokens=9)
    model = written(graph, tmp_path / "out")
    with torch.no_grad():
        assert error(model(**given).logits, run(graph, given)["logits"]) <= tolerance(graph)
    model.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())
    stack = next(param for param in graph.params.values() if param.expr.op == "dequantize_experts")
    assert {value.op for value in (take(stack.expr, 0, 0, 1), take(stack.expr, 0, 0, 2))} == {
        "dequantize", "dequantize_experts"
    }  # fmt: skip
    (whole_stack, part) = evaluate([stack.expr, take(stack.expr, 0, 1, 3)], graph.sources)
    assert torch.equal(whole_stack[1:3], part)
    calls = [call.inputs for call in kernel_calls(graph, torch.float32) if call.kernel == "packed_linear"]
    assert {2, 3, 4} <= {inputs[-1] for inputs in calls}


def test_runtimes_that_hold_one_width_say_so(apart):
    _, graph = apart
    assert emission_of(graph).target == "generated"
    refusal = propose(graph)
    assert isinstance(refusal, Refusal)
    assert "have several widths: transformers reads all experts of a model by one scheme" in refusal.reason
    with pytest.raises(TargetError, match="no GPTQ checkpoint holds this"):
        gptq_emission(graph, "gptq-v2")
    assert any("written dense" in note for note in onnx_model(graph).notes)


def test_experts_of_several_schemes_are_no_stock_checkpoint():
    """transformers reads those of all layers by the scheme that it finds first."""
    graph = plan_of("mixtral")
    steps = [Quantize(where="*.layers.0.*experts*", bits=4), Quantize(bits=8)]
    Pipeline(steps).run(graph, planned=True)
    refusal = propose(graph)
    assert isinstance(refusal, Refusal) and "reads all experts of a model by one scheme" in refusal.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, "all weights have the same bits"),
        ({"bits": 2.5, "type": "codebook"}, "stacks hold codebook of one width"),
        ({"bits": 2.5, "learn": "rounding"}, "codes of experts apart are not learned"),
    ],
    ids=str,
)
def test_what_cannot_differ(options, message):
    with pytest.raises(PassError, match=message):
        quantised("mixtral", experts="apart", **options)
