"""Rounded activations: laws of the operation, and that stock transformers rounds what the graph says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from backends.safetensors import Refusal, emit, propose
from compiler.calibration.sweep import sweep
from compiler.errors import PassError
from compiler.evaluate import load_model
from compiler.ir.ops import op_named
from compiler.pipeline import Pipeline
from compiler.target import emission_of
from passes.gqa_to_mla import GqaToMla
from passes.quantize import Quantize
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, Job, distance
from tests.families import FAMILIES

KINDS = {"int8": {"type": "int"}, "fp8": {"type": "fp8"}, "int4": {"type": "int", "bits": 4}}


def rounded(x: torch.Tensor, **options) -> torch.Tensor:
    op = op_named("fake_quantize")
    return op.eval(x, **op.all_attrs(options))


def activations(seed: int = 0) -> torch.Tensor:
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(seed))
    x[0, 3] = 0.0
    x[1, 2, 5] = 90.0
    return x


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_the_library(kind, static):
    x, options = activations(), KINDS[kind]
    bits = options.get("bits", 8)
    how = {"strategy": "tensor"} if static else {"strategy": "token", "dynamic": True}
    args = QuantizationArgs(num_bits=bits, type="float" if kind == "fp8" else "int", symmetric=True, **how)
    scale, zero = (torch.tensor([0.03]), None) if static else compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    found = rounded(x, **options, scale=0.03 if static else 0.0)
    assert torch.equal(found, fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_rounded_by_itself(kind):
    x = activations()
    whole = rounded(x, **KINDS[kind])
    assert torch.equal(rounded(x[1:, 2:3], **KINDS[kind]), whole[1:, 2:3])
    assert torch.equal(whole[0, 3], torch.zeros(48))
    relative = (whole - x).abs().amax(-1) / x.abs().amax(-1).clamp(min=1e-9)
    assert relative.max() <= {"int8": 0.51 / 127.5, "int4": 0.51 / 7.5, "fp8": 2**-4}[kind]


CASES = {
    "int8": [Quantize(activations="int8")],
    "int8 weights, fp8 activations": [Quantize(activations="fp8")],
    "int4 in groups, int8 activations": [Quantize(bits=4, group=16, activations="int8")],
    "fp8": [Quantize(type="fp8", activations="fp8")],
    "mlp alone": [Quantize(where="mlp", activations="int8")],
    "mlp rounded, attention not": [Quantize(where="mlp", activations="int8"), Quantize(bits=4, group=16)],
    "latent attention": [GqaToMla(), Quantize(activations="int8")],
}


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_with_what_was_written(name, tmp_path):
    job = Job("llama", tmp_path, CASES[name])
    emission = job.emit()
    assert job.reload_error() <= TOLERANCE
    groups = emission.quantization_config["config_groups"].values()
    assert any(group["input_activations"] for group in groups)


STATIC = {
    "int8": ("llama", Quantize(activations="int8", activation_scale="static")),
    "fp8": ("llama", Quantize(type="fp8", per="tensor", activations="fp8", activation_scale="static")),
    "fused": ("phi3", Quantize(activations="int8", activation_scale="static")),
}


@pytest.mark.parametrize(("name", "step"), STATIC.values(), ids=STATIC)
def test_static_scales_are_stored_and_computed_with(name, step, tmp_path):
    job = Job(name, tmp_path, [step], calibration=lambda graph: [FAMILIES[name].inputs()])
    emission = job.emit()
    assert job.reload_error() <= TOLERANCE
    scales = [node.attr("scale") for node in job.graph.nodes_named("fake_quantize")]
    stored = load_file(job.out / "model.safetensors")
    found = {float(tensor) for key, tensor in stored.items() if key.endswith("input_scale")}
    assert found == set(scales) and all(scales)
    (group,) = emission.quantization_config["config_groups"].values()
    assert group["input_activations"]["strategy"] == "tensor" and not group["input_activations"]["dynamic"]


def test_static_scales_clip_nothing_that_was_seen():
    """The largest magnitude that calibration shows becomes the largest code."""
    graph = graph_of("llama")
    inputs = FAMILIES["llama"].inputs()
    step = Quantize(where="model.layers.0.*", activations="int8", activation_scale="static")
    Pipeline([step]).run(graph, calibration=lambda graph: [inputs])
    first = graph.nodes_named("fake_quantize")[0]
    values: dict[str, torch.Tensor] = {}

    def see(value, tensor):
        if value is first.input(0):
            values["x"] = tensor

    for stage in sweep(graph, [inputs]):
        stage.observe(see)
    assert first.attr("scale") == pytest.approx(float(values["x"].abs().amax()) / 127.5, rel=1e-6)


def test_a_scale_of_no_activations_is_an_error():
    with pytest.raises(PassError, match="no activations are rounded"):
        Pipeline([Quantize(activation_scale="static")]).run(plan_of("llama"), planned=True)


CACHES = {
    "int8": ("mistral", Quantize(cache="int8")),
    "fp8 beside rounded activations": ("llama", Quantize(bits=4, group=16, activations="int8", cache="fp8")),
}


@pytest.mark.parametrize(("name", "step"), CACHES.values(), ids=CACHES)
def test_transformers_rounds_keys_and_values_as_the_graph_does(name, step, tmp_path):
    job = Job(name, tmp_path, [step], calibration=lambda graph: [FAMILIES[name].inputs()])
    emission = job.emit()
    exact = Job(name, tmp_path / "exact", [replace(step, cache="none")])
    assert distance(exact.outputs(), job.outputs()) > 10 * TOLERANCE
    assert job.reload_error() <= TOLERANCE
    scheme = emission.quantization_config["kv_cache_scheme"]
    assert (scheme["strategy"], scheme["dynamic"], scheme["num_bits"]) == ("tensor", False, 8)
    stored = load_file(job.out / "model.safetensors")
    assert stored["model.layers.1.self_attn.k_scale"].shape == stored["model.layers.0.self_attn.v_scale"].shape == (1,)


def test_a_model_without_a_cache_has_none_to_round():
    with pytest.raises(PassError, match="no attention of the model caches keys and values"):
        Pipeline([Quantize(cache="fp8")]).run(plan_of("bert"), planned=True, calibration=lambda g: [])


def test_rounded_caches_of_exact_weights_are_refused():
    graph = plan_of("t5")
    Pipeline([Quantize(cache="fp8")]).run(graph, planned=True, calibration=lambda g: [])
    refusal = propose(graph)
    assert isinstance(refusal, Refusal)
    assert "caches are rounded in one way in all layers or in none" in refusal.reason


@pytest.mark.parametrize("name", ["phi3", "bert", "vit", "t5"])
def test_other_families(name, tmp_path):
    job = Job(name, tmp_path, [Quantize(activations="int8")])
    job.emit()
    assert job.reload_error() <= TOLERANCE


def test_loading_as_a_user_does(tmp_path):
    """With the forward pass that first dequantises."""
    job = Job("llama", tmp_path, CASES["int8"])
    job.emit()
    model, found = AutoModelForCausalLM.from_pretrained(job.out, dtype="auto", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    with torch.no_grad():
        theirs = model(**job.family.inputs())
    assert distance(theirs, job.outputs()) <= TOLERANCE


def test_generated_code_rounds_too(tmp_path):
    job = Job("llama", tmp_path, CASES["fp8"])
    (tmp_path / "own").mkdir()
    emit(emission_of(job.graph, "generated"), job.graph.sources, tmp_path / "own")
    with torch.no_grad():
        theirs = load_model(tmp_path / "own", trust_remote_code=True)(**job.family.inputs())
    assert distance(theirs, job.outputs()) <= TOLERANCE


def test_matrices_of_one_input_share_its_rounding():
    graph = plan_of("llama")
    Pipeline(CASES["int8"]).run(graph, planned=True)
    layer = [node for node in graph.nodes_named("fake_quantize") if node.scope.startswith("model.layers.0")]
    assert [len(node.output.users) for node in layer] == [3, 1, 2, 1]


def test_what_is_no_linear_map_of_tokens_keeps_its_inputs(tmp_path):
    job = Job("mixtral", tmp_path, [Quantize(activations="int8")])
    reasons = {skip.reason for entry in job.report.passes for skip in entry.skipped}
    assert "its inputs stay as they are: it is read by `experts`" in reasons


def test_zero_points_beside_rounded_activations_are_refused():
    graph = plan_of("llama")
    Pipeline([Quantize(bits=4, group=16, symmetric=False, activations="int8")]).run(graph, planned=True)
    refusal = propose(graph)
    assert isinstance(refusal, Refusal)
    assert "transformers reads packed zero points only of models with exact activations" in refusal.reason


def test_the_embedding_is_stored_without(tmp_path):
    job = Job("llama", tmp_path, [Quantize(activations="int8", tied="copy")], tie_word_embeddings=True)
    job.emit()
    assert load_file(job.out / "model.safetensors")["lm_head.weight"].dtype == torch.int8
    assert job.reload_error() <= TOLERANCE
