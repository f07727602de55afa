"""Stock targets: what is written loads as what it was, and what does not fit is explained."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from backends.safetensors import Refusal, emit, propose, require
from backends.safetensors.assemble import assemble
from backends.safetensors.targets.deepseek_v3 import THETA, _factors
from backends.safetensors.unify import Mismatch, unify
from compiler.errors import TargetError
from compiler.frontend import capture
from compiler.ir.facts import mlp_sites
from compiler.ir.graph import Graph
from compiler.ir.types import TensorType
from compiler.pipeline import Pipeline
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import load
from compiler.weights.ops.basic import concat, index, literal, reshape, slice, transpose
from compiler.weights.source import MemorySource
from passes.gqa_to_mla import GqaToMla
from passes.quantize import Quantize
from tests.captures import graph_of, plan_of
from tests.emitted import Job
from tests.families import FAMILIES

# --- identity ----------------------------------------------------------------------------------------------------

IN_BFLOAT16 = ("llama", "phi3", "mixtral", "t5", "deepseek_v3")
CASES = [*((name, torch.float32) for name in FAMILIES), *((name, torch.bfloat16) for name in IN_BFLOAT16)]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_what_no_pass_changed_is_written_as_it_was(name, dtype, tmp_path):
    """The same tensors under the same names, bit for bit, and a config that means the same."""
    job = Job(name, tmp_path, dtype=dtype)
    emission = job.emit()
    before, after = (load_file(path / "model.safetensors") for path in (job.source, job.out))
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    assert emission.nbytes == sum(tensor.nbytes for tensor in before.values())
    assert emission.architecture == job.family.architecture
    configs = [json.loads((path / "config.json").read_text()) for path in (job.source, job.out)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "whisper"])
def test_what_no_pass_changed_computes_what_it_did(name, tmp_path):
    job = Job(name, tmp_path)
    job.emit()
    inputs, cls = job.family.inputs(), getattr(transformers, job.family.architecture)
    with torch.no_grad():
        before, after = (cls.from_pretrained(path).eval()(**inputs) for path in (job.source, job.out))
    assert torch.equal(before.logits, after.logits)


def test_a_live_module_is_written_as_its_family(tmp_path):
    family = FAMILIES["phi3"]
    model = family.build()
    graph = capture(model)
    emit(require(graph), graph.sources, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_tied_weights_are_written_once(tmp_path):
    job = Job("llama", tmp_path, tie_word_embeddings=True)
    emission = job.emit()
    assert "lm_head.weight" not in emission.tensors
    assert job.graph.params["model.embed_tokens.weight"].aliases == ("lm_head.weight",)


def test_generation_config_comes_along(tmp_path):
    job = Job("llama", tmp_path)
    job.emit()
    assert (job.source / "generation_config.json").read_bytes() == (job.out / "generation_config.json").read_bytes()


def narrowed(width, layers=(0, 1)) -> Graph:
    """A llama whose MLPs in ``layers`` keep their first ``width`` inner dims."""
    graph = graph_of("llama")
    for site in [site for i, site in enumerate(mlp_sites(graph)) if i in layers]:
        values = {}
        for node, axis in ((site.gate, 0), (site.up, 0), (site.down, 1)):
            weight = node.input(1)
            values[node] = graph.add_param(f"{weight.name}.cut", slice(weight.expr, axis, 0, width))
        inner = [graph.op("linear", [node.input(0), values[node]], before=site.down) for node in (site.gate, site.up)]
        inner = graph.op("mul", [graph.op("silu", inner[:1], before=site.down), inner[1]], before=site.down)
        graph.replace(site.down.output, graph.op("linear", [inner, values[site.down]], before=site.down))
    graph.prune()
    return graph


def test_a_narrower_mlp_stays_in_its_family():
    found = require(narrowed(56))
    assert (found.target, found.config["intermediate_size"]) == ("same family", 56)
    assert found.tensors["model.layers.1.mlp.down_proj.weight"].shape == (48, 56)


def test_mlps_of_different_widths_have_no_class():
    refusal = propose(narrowed(56, layers=(1,)))
    assert isinstance(refusal, Refusal)
    assert "same family: `linear` in the model reads f32[56,48]; the target's reads f32[80,48]" in refusal.reason


def test_a_plain_module_has_no_target():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    graph = capture(module, inputs={"input": torch.zeros(2, 4)})
    with pytest.raises(TargetError) as raised:
        require(graph)
    assert raised.value.cause == (
        "no stock model class computes this: same family: the source is no transformers model; "
        "deepseek_v3: it has no latent attention"
    )


# --- DeepSeek-V3 -------------------------------------------------------------------------------------------------


def test_the_config_of_latent_attention(tmp_path):
    graph = plan_of("llama")
    Pipeline([GqaToMla()]).run(graph, planned=True)
    config = dict(propose(graph).config)
    rotary = config.pop("rope_parameters")
    assert config == {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "float32",
        "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "hidden_act": "silu", "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": None,
        "qk_rope_head_dim": 24, "qk_nope_head_dim": 0, "v_head_dim": 12, "rope_interleave": True,
        "attention_bias": False, "attention_dropout": 0.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "first_k_dense_replace": 2, "n_routed_experts": 1, "n_shared_experts": 1, "num_experts_per_tok": 1,
        "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8, "num_nextn_predict_layers": 0,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "initializer_range": 0.02,
    }  # fmt: skip
    assert (rotary["rope_type"], rotary["original_max_position_embeddings"]) == ("longrope", 64)
    assert rotary["attention_factor"] == pytest.approx((24**0.5 * 12**-0.5) ** 0.5)
    assert len(rotary["short_factor"]) == 12 and rotary["short_factor"] == rotary["long_factor"]


@pytest.mark.parametrize("base", [1e4, 5e5, 1e6])
def test_any_frequencies_can_be_written_as_factors(base):
    """transformers' own arithmetic gives them back to one unit in the last place, most of them exactly."""
    pairs = 1 / base ** (torch.arange(0, 64, 2).float() / 64)
    wanted = torch.cat([pairs, pairs, pairs.flip(0)])
    factors = torch.tensor(_factors(wanted, 2 * len(wanted)), dtype=torch.float32)
    theirs = 1.0 / (factors * THETA ** (torch.arange(0, 2 * len(wanted), 2).float() / (2 * len(wanted))))
    off = (theirs - wanted).abs() / wanted
    assert off.max() <= torch.finfo(torch.float32).eps
    assert (off == 0).float().mean() > 0.5


# --- unification -------------------------------------------------------------------------------------------------


def chain(*ops, shape=(3, 4), constant=(1.0, 2.0)) -> Graph:
    """x, then ``ops``: "linear", "bias" (a linear map with one), "norm", "twice" (x + constant * x)."""
    graph = Graph("chain")
    x = graph.add_input("x", TensorType(torch.float32, ("B", 4)))
    for i, op in enumerate(ops):
        name, _, scope = op.partition(" ")
        weight = graph.add_param(f"w{i}", load("model", f"w{i}", TensorType(torch.float32, (4, 4))))
        vector = graph.add_param(f"v{i}", load("model", f"v{i}", TensorType(torch.float32, (4,))))
        fixed = graph.add_param(f"c{i}", literal(constant * 2), persistent=False)
        match name:
            case "linear":
                x = graph.op("linear", [x, weight], scope=scope)
            case "bias":
                x = graph.op("linear", [x, weight, vector], scope=scope)
            case "norm":
                x = graph.op("rms_norm", [x, vector], {"eps": 1e-6}, scope=scope)
            case "coarse":
                x = graph.op("rms_norm", [x, vector], {"eps": 1e-5}, scope=scope)
            case "twice":
                x = graph.op("add", [x, graph.op("mul", [fixed, x])], scope=scope)
            case "swapped":
                x = graph.op("add", [graph.op("mul", [x, fixed]), x], scope=scope)
    graph.outputs["y"] = x
    graph.prune()
    return graph


def test_parameters_are_matched_by_the_part_they_play():
    found = unify(chain("norm", "linear", "twice", "linear"), chain("norm", "linear", "swapped", "linear"))
    assert {name: param.name for name, param in found.items()} == {"v0": "v0", "w1": "w1", "w3": "w3"}


DIFFERENCES = {
    "another operation": (
        ("linear a", "norm b"), ("linear a", "linear c"),
        "this model has `linear` in c (f32[B,4], f32[4,4]) where the target has `rms_norm` in b (f32[B,4], f32[4])",
    ),
    "an attribute": (
        ("norm a",), ("coarse a",),
        "`rms_norm` in a has eps 1e-05; the target's has eps 1e-06",
    ),
    "a bias": (("linear a",), ("bias a",), "`linear` in a has a bias only here: f32[4]"),
    "a bias there": (("bias a",), ("linear a",), "`linear` in a has a bias only in the target: f32[4]"),
    "more": (("linear a",), ("linear a", "norm b"), "only this model has `rms_norm` in b (f32[B,4], f32[4])"),
    "less": (("linear a", "norm b"), ("linear a",), "only the target has `rms_norm` in b (f32[B,4], f32[4])"),
}  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours", "reason"), DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_the_first_difference_is_told(theirs, ours, reason):
    found = unify(chain(*theirs), chain(*ours))
    assert isinstance(found, Mismatch)
    assert found.reason == reason


def test_constants_must_agree():
    found = unify(chain("twice"), chain("twice", constant=(1.0, 2.5)))
    assert found == Mismatch("the constants c0 there and c0 here differ")
    assert unify(chain("twice"), chain("twice", constant=(1.0, 2.0000002))) == {}


def test_a_tie_that_only_the_target_has_is_a_mismatch():
    tied, free = chain("linear", "linear"), chain("linear", "linear")
    second = list(tied.nodes)[1]
    tied.set_input(second, 1, tied.params["w0"])
    tied.prune()
    assert unify(tied, free) == Mismatch("w0 is one weight there; here w0 and w1 are different ones")
    assert {name: param.name for name, param in unify(free, tied).items()} == {"w0": "w0", "w1": "w0"}


def test_other_inputs_are_a_difference():
    other = Graph("other")
    x = other.add_input("z", TensorType(torch.float32, ("B", 4)))
    weight = other.add_param("w0", load("model", "w0", TensorType(torch.float32, (4, 4))))
    other.outputs["y"] = other.op("linear", [x, weight])
    assert isinstance(unify(chain("linear"), other), Mismatch)


# --- assembly ----------------------------------------------------------------------------------------------------

STORED = load("model", "stored", TensorType(torch.float32, (6, 4)))
HEADS = reshape(STORED, (2, 3, 4))
TAKEN_APART = {
    "whole": [STORED],
    "transposed": [transpose(STORED)],
    "rows": [slice(STORED, 0, 0, 2), slice(STORED, 0, 2, 6)],
    "columns, out of order": [slice(STORED, 1, 3, 4), slice(STORED, 1, 0, 3)],
    "rows of heads": [reshape(slice(HEADS, 1, a, a + 1), (2, 4)) for a in range(3)],
    "slices of a transpose": [transpose(slice(transpose(STORED), 1, a, a + 3)) for a in (0, 3)],
    "slices of slices": [slice(STORED, 0, 0, 2), slice(slice(STORED, 0, 2, 6), 1, 0, 1),
                         slice(slice(STORED, 0, 2, 6), 1, 1, 4)],
    "permuted": [index(STORED, 0, (5, 3, 1, 0, 2, 4))],
}  # fmt: skip


def taken_apart(exprs) -> Graph:
    graph = Graph("parts")
    for i, expr in enumerate(exprs):
        graph.add_param(f"part{i}", expr)
    return graph


@pytest.mark.parametrize("exprs", TAKEN_APART.values(), ids=TAKEN_APART.keys())
def test_parts_are_put_back_together(exprs):
    tensor = torch.arange(24.0).reshape(6, 4)
    parts = evaluate(exprs, {"model": MemorySource({"stored": tensor})})
    source = MemorySource({f"part{i}": part for i, part in enumerate(parts)})
    found = assemble(taken_apart(exprs), {name: load("parts", name, type) for name, type in source.types.items()})
    assert torch.equal(evaluate([found["stored"]], {"parts": source})[0], tensor)


BROKEN = {
    "a part is missing": [slice(STORED, 0, 0, 2)],
    "parts overlap": [slice(STORED, 0, 0, 4), slice(STORED, 0, 2, 6)],
    "rows twice": [index(STORED, 0, (0, 0, 1, 2, 3, 4))],
}


@pytest.mark.parametrize("exprs", BROKEN.values(), ids=BROKEN.keys())
def test_parts_that_do_not_make_it_up_are_a_mismatch(exprs):
    graph = taken_apart(exprs)
    found = assemble(graph, {name: param.expr for name, param in graph.params.items()})
    assert found == Mismatch("stored is used in parts that do not make it up")


def test_a_parameter_made_of_two_tensors_cannot_be_undone():
    graph = taken_apart([concat([STORED, load("model", "other", STORED.type)], 0)])
    found = assemble(graph, {"part0": graph.params["part0"].expr})
    assert found == Mismatch("part0 is made in a way that cannot be undone")


def test_experts_that_no_loader_finds_quantised_have_no_class():
    """The files of this family hold experts under names that neither a linear module nor an expert has."""
    sizes = {**FAMILIES["mixtral"].options, "hidden_size": 32, "intermediate_size": 64}
    graph = capture(transformers.GraniteMoeConfig(num_hidden_layers=1, **sizes), architecture="GraniteMoeForCausalLM")
    Pipeline([Quantize(bits=8, where="experts")]).run(graph, planned=True)
    refusal = propose(graph)
    assert isinstance(refusal, Refusal) and "is no weight of a linear module or an expert" in refusal.reason


def test_refusals_of_every_target_are_told():
    graph = plan_of("llama")
    Pipeline([GqaToMla()]).run(graph, planned=True)
    graph.nodes_named("rms_norm")[0].attrs["eps"] = 1e-3
    refusal = propose(graph)
    assert isinstance(refusal, Refusal)
    assert refusal.target == "same family, deepseek_v3"
    assert "deepseek_v3: `rms_norm` in model.layers.0.post_attention_layernorm has eps 1e-06" in refusal.reason
