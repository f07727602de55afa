"""Rounding to integers: what is chosen and what is not, and that transformers computes with what we wrote."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from backends.safetensors import Refusal, emit, propose
from compiler.errors import PassError
from compiler.evaluate import load_model
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.pipeline import Pipeline
from passes.gqa_to_mla import GqaToMla
from passes.quantize import Quantize
from tests.captures import plan_of
from tests.emitted import TOLERANCE, Job, distance
from tests.test_gqa_to_mla import Decoder

SCHEMES = {
    "int8": [Quantize(bits=8)],
    "int8 grouped": [Quantize(bits=8, group=16)],
    "int8 asymmetric": [Quantize(bits=8, symmetric=False)],
    "int4": [Quantize(bits=4, group=16)],
    "int4 asymmetric": [Quantize(bits=4, group=16, symmetric=False)],
    "int4 per row, not searched": [Quantize(bits=4, scale="minmax")],
    "int3, robust": [Quantize(bits=3, group=16, scale="robust")],
    "int5 asymmetric": [Quantize(bits=5, symmetric=False)],
    "int2": [Quantize(bits=2, group=8)],
    "two schemes": [Quantize(where="mlp", bits=4, group=16), Quantize(bits=8)],
    "three schemes": [Quantize(where="mlp.down", bits=2, group=16), Quantize(where="mlp", bits=4), Quantize(bits=8)],
    "attention alone": [Quantize(where="attention", bits=4, group=16)],
    "embedding": [Quantize(where="embedding", bits=8)],
    "latent attention, int8": [GqaToMla(), Quantize(bits=8)],
    "latent attention, int4": [GqaToMla(), Quantize(bits=4, group=8)],
    "latent attention, int4 asymmetric": [GqaToMla(), Quantize(bits=4, group=8, symmetric=False)],
    "latent attention, two schemes": [GqaToMla(), Quantize(where="attention", bits=8), Quantize(bits=4, group=16)],
}
IN_BFLOAT16 = ("int8", "int4 asymmetric", "two schemes", "latent attention, int4")
CASES = [*((name, torch.float32) for name in SCHEMES), *((name, torch.bfloat16) for name in IN_BFLOAT16)]


@pytest.mark.parametrize(("scheme", "dtype"), CASES, ids=str)
def test_transformers_computes_with_what_was_written(scheme, dtype, tmp_path):
    job = Job("llama", tmp_path, SCHEMES[scheme], dtype)
    emission = job.emit()
    assert job.reload_error() <= TOLERANCE
    assert emission.quantization_config["quant_method"] == "compressed-tensors"
    stored = load_file(job.out / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == emission.nbytes == job.report.after.stored_bytes


@pytest.mark.parametrize("passes", [SCHEMES["int4"], SCHEMES["two schemes"]], ids=["one scheme", "two"])
def test_loading_as_a_user_does(passes, tmp_path):
    """In the checkpoint's own dtype, with the forward pass that first dequantises."""
    job = Job("llama", tmp_path, passes)
    job.emit()
    model, found = AutoModelForCausalLM.from_pretrained(job.out, dtype="auto", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    with torch.no_grad():
        logits = model(**job.family.inputs()).logits
    ours = job.outputs()["logits"]
    assert (logits - ours).abs().max() <= TOLERANCE * ours.abs().max()


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt_neox", "bert", "vit", "t5", "mixtral", "gemma2", "deepseek_v3"])
def test_other_families(name, tmp_path):
    """Biases, fused and renamed projections, encoders, images, experts, heads tied to the embedding."""
    job = Job(name, tmp_path, [Quantize(bits=8)])
    emission = job.emit()
    assert job.reload_error() <= TOLERANCE
    assert emission.nbytes <= job.report.after.stored_bytes


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_up_projection_of_exact_latent_attention_is_quantised_exactly(bits, dtype):
    decoder = Decoder(dtype=dtype)
    decoder.convert()
    exact = decoder.outputs()
    Pipeline([Quantize(where="attention.kv_up", bits=bits, group=16)]).run(decoder.graph)
    assert torch.equal(decoder.outputs(), exact)


def test_shrunk_rows_are_quantised_like_any_other():
    """Down-projections in four bits move the result as far as the key and value projections they were made from."""
    plain, latent = Decoder(dtype=torch.bfloat16), Decoder(dtype=torch.bfloat16)
    exact = plain.outputs()
    Pipeline([Quantize(where=["attention.key", "attention.value"], bits=4)]).run(plain.graph)
    latent.convert()
    Pipeline([Quantize(where="attention.kv_down", bits=4)]).run(latent.graph)
    direct, through = ((decoder.outputs() - exact).norm() for decoder in (plain, latent))
    assert abs(through / direct - 1) < 0.01


def config_of(job: Job) -> dict:
    job.emit()
    return json.loads((job.out / "config.json").read_text())["quantization_config"]


def test_the_config_names_what_is_quantised_and_nothing_else(tmp_path):
    config = config_of(Job("llama", tmp_path, [Quantize(where="mlp.down", bits=4, group=16), Quantize(skip=("head",))]))
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    first, second = config["config_groups"].values()
    assert (first["targets"], first["format"], first["weights"]["group_size"]) == (down, "pack-quantized", 16)
    assert (second["targets"], second["format"]) == (["Linear"], "int-quantized")
    assert second["weights"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel",
    }  # fmt: skip
    assert config["ignore"] == ["lm_head"]
    assert config["format"] == "mixed-precision"


def test_scales_have_the_dtype_of_the_weights(tmp_path):
    job = Job("llama", tmp_path, [Quantize(bits=4, group=16, symmetric=False)], torch.bfloat16)
    job.emit()
    stored = load_file(job.out / "model.safetensors")
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in stored.items() if "q_proj" in name}
    assert kinds == {
        "weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64,
        "weight_zero_point": torch.int32,
    }  # fmt: skip


def skipped(job: Job) -> dict[str, str]:
    return {skip.scope: skip.reason for entry in job.report.passes for skip in entry.skipped}


TIED = "shares its tensor with the embedding; `tied: copy` gives the head a copy, `share` quantises it for both"


def test_a_tied_head_is_left_alone_unless_asked(tmp_path):
    job = Job("llama", tmp_path / "skip", [Quantize()], tie_word_embeddings=True)
    assert skipped(job) == {"model.embed_tokens.weight": TIED}
    job.emit()
    assert "lm_head.weight" not in load_file(job.out / "model.safetensors")
    assert job.reload_error() <= TOLERANCE


def test_a_tied_head_gets_its_own_copy_when_asked(tmp_path):
    job = Job("llama", tmp_path, [Quantize(tied="copy")], tie_word_embeddings=True)
    emission = job.emit()
    assert not skipped(job)
    stored = load_file(job.out / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.int8
    assert stored["model.embed_tokens.weight"].dtype == torch.float32
    assert emission.config["tie_word_embeddings"] is False
    assert job.reload_error() <= TOLERANCE


def test_a_head_whose_bias_is_tied_too_gets_its_own_copy(tmp_path):
    job = Job("bert", tmp_path, [Quantize(bits=8, tied="copy")])
    job.emit()
    assert job.reload_error() <= TOLERANCE


@pytest.mark.parametrize(("labels", "loads"), [(3, False), (8, False), (9, True)])
def test_zero_points_of_few_rows_are_refused_by_name(labels, loads, tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64}
    config = LlamaConfig(num_hidden_layers=1, num_labels=labels, pad_token_id=0, **small)
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "source")
    graph = capture(tmp_path / "source")
    Pipeline([Quantize(bits=4, group=16, symmetric=False)]).run(graph)
    found = propose(graph)
    if not loads:
        assert isinstance(found, Refusal)
        assert "score.weight has too few rows" in found.reason
        return
    (tmp_path / "out").mkdir()
    emit(found, graph.sources, tmp_path / "out")
    ids = torch.randint(1, 64, (2, 7))
    with torch.no_grad():
        theirs = load_model(tmp_path / "out")(input_ids=ids)
    assert distance(theirs, run(graph, {"input_ids": ids})) <= TOLERANCE


def test_what_is_quantised_already_stays_as_it_is(tmp_path):
    job = Job("llama", tmp_path, [Quantize(where="mlp.up", bits=4), Quantize(where="mlp", bits=8)])
    assert skipped(job) == {f"model.layers.{i}.mlp.up_proj.weight": "is quantised already, to 4 bits" for i in range(2)}


def test_what_is_no_matrix_is_left_alone(tmp_path):
    job = Job("llama", tmp_path, [Quantize(where="model.layers.0.*")])
    norms = {"model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"}
    assert skipped(job) == dict.fromkeys(norms, "is no matrix of floats but f32[48]")


def test_routers_are_left_alone(tmp_path):
    job = Job("mixtral", tmp_path, [Quantize()])
    reason = "is a router: rounding it changes which experts are chosen"
    assert skipped(job) == {f"model.layers.{i}.mlp.gate.weight": reason for i in range(2)}


def test_a_group_that_does_not_divide_names_groups_that_do(tmp_path):
    graph = plan_of("llama")
    with pytest.raises(PassError) as raised:
        Pipeline([Quantize(bits=4, group=32)]).run(graph)
    assert raised.value.cause == (
        "groups of 32 do not divide 48, the input width of model.layers.0.self_attn.q_proj.weight "
        "(nor that of 14 more weights)"
    )
    assert raised.value.remedy == (
        "groups that divide every selected width: 16, 8, 4; 0 is one scale a row; `skip` leaves weights out"
    )
    assert raised.value.option == "group"


def test_a_negative_group_is_an_error():
    with pytest.raises(PassError, match="group -1 is negative"):
        Pipeline([Quantize(group=-1)]).run(plan_of("llama"))


REFUSALS = {
    "experts beside": (
        "mixtral", [Quantize(where="attention")],
        "transformers reads no dense experts (model.layers.0.block_sparse_moe.experts.0.w2.weight) beside quantised "
        "weights; quantise them too",
    ),
    "zero points of experts": (
        "mixtral", [Quantize(bits=4, symmetric=False)],
        "transformers reads no zero points of experts; make them symmetric",
    ),
    "packed zero points and a second scheme": (
        "llama", [Quantize(where="mlp", bits=4, symmetric=False), Quantize(bits=8)],
        "transformers reads packed zero points only of models with one scheme; make the weights symmetric",
    ),
    "a stored transpose": (
        "gpt2", [Quantize()],
        "transformer.h.0.attn.c_attn.weight would be quantised in part, or along its rows; give it one scheme, "
        "or skip it",
    ),
    "half of a fused projection": (
        "phi3", [Quantize(where="attention.query")],
        "model.layers.0.self_attn.qkv_proj.weight would be quantised in part, or along its rows; give it one scheme, "
        "or skip it",
    ),
    "a class that looks at packed weights": (
        "t5", [Quantize(where="mlp", bits=4), Quantize(bits=8)],
        "transformers cannot load T5ForConditionalGeneration quantised like this: 'Linear' object has no attribute "
        "'weight'; it may load with one scheme for all weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "passes", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_transformers_could_not_load_is_refused_before_a_weight_is_read(name, passes, reason):
    graph = plan_of(name)
    Pipeline(passes).run(graph, planned=True)
    refusal = propose(graph)
    assert isinstance(refusal, Refusal)
    assert f"same family: {reason}; " in refusal.reason


def test_a_runtime_that_fuses_projections_is_warned_of(tmp_path):
    graph = plan_of("llama")
    Pipeline([Quantize(where="attention.query", bits=4, group=16), Quantize()]).run(graph, planned=True)
    assert propose(graph).notes == (
        "vLLM reads int-quantized weights only where activations are quantised too",
        "vLLM needs one scheme for q_proj, k_proj, v_proj, which differ in model.layers.0.self_attn",
    )
