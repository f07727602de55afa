"""Zero points that are any numbers: never worse than integers, fitted as solvers ask, held by generated modules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.onnx import propose as onnx_model
from backends.safetensors.emission import Refusal, propose
from backends.torch_module import kernel_calls
from compiler import Recipe, compress
from compiler.errors import PassError
from compiler.ir.execute import run
from compiler.pipeline import Pipeline
from compiler.weights.evaluate import evaluate
from compiler.weights.ops import take
from compiler.weights.ops.integer import Integer
from compiler.weights.ops.real_zeros import RealZeros
from passes import Quantize
from tests.captures import graph_of, plan_of
from tests.families import FAMILIES
from tests.small import write_folder, write_recipe
from tests.test_generated import error, tolerance, written
from tests.test_generated_packed import matrices_of
from tests.test_packing import bound
from tests.test_quantize_calibrated import quantised


def lost(codec, values, power=2.0, weights=1.0):
    parameters = codec.fit(values, None if isinstance(weights, float) else weights)
    found = codec.decode(codec.encode(values, parameters), parameters)
    return ((found - values).abs().pow(power) * weights).sum(-1)


@pytest.mark.parametrize("power", [2.0, 0.7])
@settings(max_examples=25, deadline=None)
@given(
    bits=st.integers(2, 8),
    seed=st.integers(0, 2**16),
    shift=st.sampled_from([0.0, 0.3, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_real_zero_points_never_lose_to_integers(power, bits, seed, shift, dtype):
    """Group by group, also of one value and of zeros, and where errors are weighed."""
    source = torch.Generator().manual_seed(seed)
    values = (torch.randn(8, 3, 16, generator=source) + shift).to(dtype).float()
    values[0], values[1] = 0.0, values[1, :, :1]
    weights = torch.rand(16, generator=source)
    for given_weights in (1.0, weights):
        codecs = Integer(bits, 16, dtype, False, power=power), RealZeros(bits, 16, dtype, power)
        integer, real = (lost(codec, values, power, given_weights) for codec in codecs)
        assert (real <= integer * (1 + 1e-5) + values.abs().pow(power).sum(-1) * 1e-5**power).all()


def test_they_gain_a_tenth_of_the_squared_error_of_normal_weights():
    values = torch.randn(64, 4, 64, generator=torch.Generator().manual_seed(1))
    for bits in (2, 3, 4):
        integer, real = (
            float(lost(codec, values).sum())
            for codec in (Integer(bits, 64, torch.float32, False), RealZeros(bits, 64, torch.float32))
        )
        assert real < 0.92 * integer


def test_what_is_made_lazily_is_what_is_fitted_and_any_rows_of_it():
    values = torch.randn(12, 64, generator=torch.Generator().manual_seed(2))
    (weight,), sources = bound(w=values)
    codec = RealZeros(3, 16, torch.float32)
    expr = codec.nearest(weight)
    parameters = codec.fit(values.unflatten(-1, (4, -1)))
    wanted = codec.decode(codec.encode(values.unflatten(-1, (4, -1)), parameters), parameters).flatten(-2)
    found, part = evaluate([expr, take(expr, 0, 3, 7)], sources)
    assert torch.equal(found, wanted) and torch.equal(part, wanted[3:7])


@pytest.mark.parametrize("name", ["mixtral", "gemma2"])
def test_generated_modules_hold_them(name, tmp_path):
    graph, given_inputs = graph_of(name), FAMILIES[name].inputs(batch=2, tokens=9)
    for index, param in enumerate(matrices_of(graph)):
        group = 8 if param.type.shape[-1] % 8 == 0 and index % 2 else 0
        param.expr = RealZeros((4, 3, 2)[index % 3], group, param.storage).nearest(param.expr)
    model = written(graph, tmp_path / "out")
    with torch.no_grad():
        found = model(**given_inputs).logits
    assert error(found, run(graph, given_inputs)["logits"]) <= 4 * tolerance(graph)
    calls = [call.inputs for call in kernel_calls(graph, torch.float32) if call.kernel == "packed_linear"]
    assert {2, 3, 4} <= {inputs[-1] for inputs in calls} and all(inputs[3] is None for inputs in calls)


@pytest.mark.parametrize("method", ["gptq", "refined"])
def test_solvers_take_them(method):
    """And what they minimise is no more than with integers."""
    errors = []
    for zeros in ("integer", "real"):
        graph, report, _ = quantised(
            "llama", where="mlp", bits=3, group=16, symmetric=False, zeros=zeros, method=method
        )
        errors.append(sum(each.numbers["relative_error"] for each in report.rewritten))
    assert errors[1] < errors[0]
    assert {"dequantize_real"} == {p.expr.op for p in graph.params.values() if p.expr.op.startswith("dequantize")}


def test_a_job_writes_them_beside_weights_of_two_bytes(tmp_path):
    write_folder(tmp_path)
    passes = "[quantize: {bits: 3, group: 16, symmetric: false, zeros: real, tied: share}]"
    result = compress(Recipe.load(write_recipe(tmp_path, passes)), tmp_path / "out")
    assert result.document["verification"]["performed"]
    assert result.document["output"]["architecture"].startswith("Compressed")


def test_formats_of_integers_say_that_they_do_not_hold_them():
    graph = plan_of("llama", head_dim=16)
    Pipeline([Quantize(bits=4, group=16, symmetric=False, zeros="real")]).run(graph, planned=True)
    reasons = {
        "compressed-tensors": "compressed-tensors has no zero points that are no integers",
        "gptq-v2": "GPTQ checkpoints hold integers of",
    }
    for layout, reason in reasons.items():
        refusal = propose(graph, layout)
        assert isinstance(refusal, Refusal) and reason in refusal.reason
    assert any("written dense" in note for note in onnx_model(graph).notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there are no zero points that might be any numbers"),
        ({"type": "fp8"}, "there are no zero points that might be any numbers"),
        ({"symmetric": False, "scale": "minmax"}, "`scale: minmax` rounds zero points to integers"),
        ({"symmetric": False, "learn": "rounding"}, "codes with real zero points are not learned"),
        ({"symmetric": False, "bits": 2.5, "experts": "apart"}, "stacks hold real zero points of one width"),
    ],
    ids=str,
)
def test_what_has_no_real_zero_points(options, message):
    with pytest.raises(PassError, match=message):
        quantised("mixtral", zeros="real", **options)
