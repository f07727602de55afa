"""Law 2: exact passes, and lossy ones at their exact point, change nothing. Every pass on every family.

Where a pass refuses a family the reason is golden: a refusal that goes away, or comes, is a change to decide upon.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from backends.safetensors import Refusal, propose
from compiler.errors import PassError
from compiler.ir.execute import run
from compiler.pipeline import Pass, Pipeline
from passes import pass_class, pass_names
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, Job, distance
from tests.families import FAMILIES

STOCK = {"llama", "qwen2", "phi3"}
"""Families whose exact latent form is DeepSeek-V3's class."""

ONE_TABLE = "the class has one rotary table of constant frequencies, and this model has not"
LATENT_NORM = (
    "this model has `latent_attention` in model.layers.0.self_attn (f32[B,4,T,24], f32[B,T,24], f32[B,T,24], "
    "f32[48,24]) where the target has `rms_norm` in model.layers.0.self_attn.kv_a_layernorm (f32[B,T,24], f32[24])"
)
FIRST_NORM = "where the target has `rms_norm` in model.layers.0.input_layernorm (f32[B,T,48], f32[48])"
EXPERTS = "it has no gated MLP with an activation of the class"

NO_CLASS = {
    "mistral": LATENT_NORM, "smollm3": LATENT_NORM, "mixtral": EXPERTS, "qwen3_moe": EXPERTS,
    "gemma3": ONE_TABLE, "gpt2": ONE_TABLE, "opt": ONE_TABLE, "clip_text": ONE_TABLE, "whisper": ONE_TABLE,
    "qwen3": "this model has `split_heads` in model.layers.0.self_attn (f32[B,T,64]) where the target has `linear` in "
    "model.layers.0.self_attn.q_proj (f32[B,T,48], f32[128,48])",
    "gemma": f"this model has `mul` in model.embed_tokens (f32[B,T,48]) {FIRST_NORM}",
    "gemma2": f"this model has `mul` in model.embed_tokens (f32[B,T,48]) {FIRST_NORM}",
    "olmo2": f"this model has `linear` in model.layers.0.self_attn.q_proj (f32[B,T,48], f32[48,48]) {FIRST_NORM}",
    "granite": f"this model has `mul` in model (f32[B,T,48]) {FIRST_NORM}",
    "cohere2": f"this model has `layer_norm` in model.layers.0.input_layernorm (f32[B,T,48], f32[48]) {FIRST_NORM}",
    "gpt_neox": "this model has `layer_norm` in gpt_neox.layers.0.input_layernorm (f32[B,T,48], f32[48], f32[48]) "
    f"{FIRST_NORM}",
}  # fmt: skip
"""Families that have an exact latent form which no stock class holds, and what stands in the way."""

ALL_LOOK = "it is not causal"
LATENT = "the model's attention is latent already"

REFUSED = {
    "bert": ALL_LOOK, "roberta": ALL_LOOK, "modernbert": ALL_LOOK, "vit": ALL_LOOK, "deit": ALL_LOOK,
    "dinov2": ALL_LOOK, "clip_vision": ALL_LOOK, "siglip_vision": ALL_LOOK, "siglip_text": ALL_LOOK,
    "t5": "it adds a mask or a bias of its own to its scores", "gpt_oss": "it has attention sinks",
    "deepseek_v2": LATENT, "deepseek_v3": LATENT,
}  # fmt: skip


def exact_passes() -> list[type[Pass]]:
    return [cls for cls in map(pass_class, pass_names()) if cls.exact_when is not None]


@cache
def computed(name):
    """What a family's graph computes."""
    return run(graph_of(name), FAMILIES[name].inputs())


@pytest.mark.parametrize("cls", exact_passes(), ids=lambda cls: cls.key())
@pytest.mark.parametrize("name", FAMILIES)
def test_an_exact_pass_changes_nothing_or_says_why_it_cannot_be(name, cls):
    family = FAMILIES[name]
    graph, before = graph_of(name), computed(name)
    step = cls(**cls.exact_when)
    assert step.exact
    if cls.key() == "gqa-to-mla" and name in REFUSED:
        with pytest.raises(PassError) as raised:
            Pipeline([step]).run(graph)
        assert REFUSED[name] in raised.value.cause
        return
    Pipeline([step]).run(graph, calibration=lambda _: [family.inputs(seed=1)])
    assert distance(run(graph, family.inputs()), before) <= TOLERANCE
    if cls.key() == "gqa-to-mla":
        check_latent_class(name, graph)


def check_latent_class(name, graph):
    found = propose(graph)
    if name in STOCK:
        assert found.architecture == "DeepseekV3ForCausalLM"
    else:
        assert isinstance(found, Refusal) and found.reason.endswith(f"; deepseek_v3: {NO_CLASS[name]}")


def test_every_family_is_accounted_for():
    assert STOCK | NO_CLASS.keys() | REFUSED.keys() == FAMILIES.keys()


VARIANTS = {
    "llama": ("llama", {}),
    "llama3 frequencies": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "yarn frequencies": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                             "original_max_position_embeddings": 16}},
    ),
    "tied head": ("llama", {"tie_word_embeddings": True}),
    "multi-head": ("llama", {"num_key_value_heads": 4}),
    "multi-query": ("llama", {"num_key_value_heads": 1}),
    "heads wider than the model": ("llama", {"head_dim": 20}),
    "biases in attention": ("llama", {"attention_bias": True}),
    "another epsilon": ("llama", {"rms_norm_eps": 1e-5}),
    "tanh gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "phi3, fused and half rotated": ("phi3", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_stock_latent_attention_computes_and_caches_the_same(name, changes, tmp_path):
    """In plain transformers, without remote code: logits, live cache and greedy text are those of the original."""
    from transformers import AutoModelForCausalLM

    job = Job(name, tmp_path, [pass_class("gqa-to-mla")()], **changes)
    emission = job.emit()
    assert emission.architecture == "DeepseekV3ForCausalLM"
    original, latent = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (job.source, job.out))
    inputs = job.family.inputs(tokens=24)
    with torch.no_grad():
        theirs, ours = original(**inputs, use_cache=True), latent(**inputs, use_cache=True)
    assert distance({"logits": ours.logits}, {"logits": theirs.logits}) <= TOLERANCE
    assert cached_values(ours) == cached_values(theirs)
    prompt = inputs["input_ids"][:, :8]
    texts = [model.generate(prompt, max_new_tokens=12, do_sample=False) for model in (original, latent)]
    assert torch.equal(*texts)


def cached_values(output) -> int:
    return sum(layer.keys.numel() + layer.values.numel() for layer in output.past_key_values.layers)


def test_an_mlp_with_biases_has_no_stock_class():
    graph = plan_of("llama", mlp_bias=True)
    Pipeline([pass_class("gqa-to-mla")()]).run(graph, planned=True)
    assert propose(graph).reason.endswith(
        "deepseek_v3: `linear` in model.layers.0.mlp.gate_proj has a bias only here: f32[80]"
    )
