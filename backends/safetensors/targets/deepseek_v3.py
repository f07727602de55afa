"""DeepSeek-V3's class as a dense decoder: latent attention, rms norms, gated MLPs, one rotary table.

Its "longrope" rotary type takes the frequencies as a table, so any list of them can be written, with repeats and in
any order, and the scale of the table too. transformers computes frequency p as 1 / (factor_p * theta^(2p/R)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backends.safetensors.emission import Proposal, Refusal
from backends.safetensors.targets.same_family import shares_embedding, source_config
from backends.safetensors.targets.target import Target
from compiler.ir.facts import LatentSite, MlpSite, latent_sites, mlp_sites
from compiler.ir.graph import Graph, Node, Param
from compiler.weights.evaluate import evaluate

NAME = "deepseek_v3"
THETA = 10000.0
KEPT_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
ACTIVATIONS = {
    ("silu", ""): "silu",
    ("relu", ""): "relu",
    ("gelu", "none"): "gelu",
    ("gelu", "tanh"): "gelu_pytorch_tanh",
}
RUNTIMES = "the classes of vLLM and SGLang take neither its rotary table nor the epsilon of its latent's norm"


def propose(graph: Graph) -> tuple[Proposal, ...] | Refusal:
    """The config that latent attention, norms and MLPs of ``graph`` suggest. Refuses what has no such attention."""
    sites, mlps, tables = latent_sites(graph), mlp_sites(graph), graph.nodes_named("rope_table")
    if not sites:
        return Refusal(NAME, "it has no latent attention")
    if len(tables) != 1 or not isinstance(tables[0].input(1), Param):
        return Refusal(NAME, "the class has one rotary table of constant frequencies, and this model has not")
    if not sites[0].rotary_dim:
        return Refusal(NAME, f"the class has rotary keys, and {sites[0].scope or 'this attention'} has none")
    if not mlps or _activation(mlps[0]) is None:
        return Refusal(NAME, "it has no gated MLP with an activation of the class")
    config = {
        "model_type": "deepseek_v3",
        **_embedding(graph),
        **_attention(sites[0]),
        **_layers(len(sites)),
        "intermediate_size": mlps[0].up.output.shape[-1],
        "hidden_act": _activation(mlps[0]),
        "rms_norm_eps": _input_norm_eps(sites[0]),
        **_rotary(tables[0], graph, sites[0]),
        **_kept(graph),
    }
    return (Proposal("DeepseekV3ForCausalLM", config, (RUNTIMES,)),)


def _embedding(graph: Graph) -> dict[str, Any]:
    vocabulary, width = graph.nodes_named("embedding")[0].input(0).type.static_shape
    return {"vocab_size": vocabulary, "hidden_size": width, "tie_word_embeddings": shares_embedding(graph)}


def _attention(site: LatentSite) -> dict[str, Any]:
    down, query_down = site.kv_down, site.query_down
    return {
        "num_attention_heads": site.heads,
        "num_key_value_heads": site.heads,
        "kv_lora_rank": site.rank,
        "q_lora_rank": query_down.output.shape[-1] if query_down else None,
        "qk_rope_head_dim": site.rotary_dim,
        "qk_nope_head_dim": site.unrotated_dim,
        "v_head_dim": site.value_dim,
        "rope_interleave": True,
        "attention_bias": down is not None and down.optional_input(2) is not None,
        "attention_dropout": 0.0,
    }


def _layers(count: int) -> dict[str, Any]:
    """As many layers, none of which is a mixture of experts or predicts further tokens."""
    return {
        "num_hidden_layers": count,
        "first_k_dense_replace": count,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 8,
        "num_nextn_predict_layers": 0,
    }


def _activation(mlp: MlpSite) -> str | None:
    """What transformers calls the activation of an MLP, if it is one that the class can have."""
    node = mlp.activation
    return ACTIVATIONS.get((node.op.name, node.attr("approximate") if "approximate" in node.op.attrs else ""))


def _input_norm_eps(site: LatentSite) -> float:
    """The epsilon of the norm in front of the attention; the class has one for all layers."""
    norm = site.kv_down.input(0).node if site.kv_down else None
    return norm.attr("eps") if norm and norm.op.name == "rms_norm" else 1e-6


def _rotary(table: Node, graph: Graph, site: LatentSite) -> dict[str, Any]:
    frequencies = table.input(1)
    assert isinstance(frequencies, Param)  # `propose` refuses anything else
    length = int((source_config(graph) or {}).get("max_position_embeddings", 4096))
    factors = _factors(evaluate([frequencies.expr], graph.sources)[0].float(), site.rotary_dim)
    parameters = {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "factor": 1.0,
        "attention_factor": table.attr("scale"),
        "original_max_position_embeddings": length,
        "short_factor": factors,
        "long_factor": factors,
    }
    return {"max_position_embeddings": length, "rope_parameters": parameters}


def _factors(frequencies: Tensor, width: int) -> list[float]:
    """The factors whose frequencies, in the float32 arithmetic of transformers, come nearest to ``frequencies``."""
    base = THETA ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    middle = (1.0 / frequencies.double() / base.double()).float()
    choices = [middle, torch.nextafter(middle, 2 * middle), torch.nextafter(middle, 0 * middle)]
    errors = torch.stack([(1.0 / (choice * base) - frequencies).abs() for choice in choices])
    return torch.stack(choices).gather(0, errors.argmin(0, keepdim=True))[0].tolist()


def _kept(graph: Graph) -> dict[str, Any]:
    """Entries of the source's config that say nothing about what is computed."""
    config = source_config(graph) or {}
    return {key: config[key] for key in KEPT_KEYS if key in config}


TARGET = Target(NAME, propose)
