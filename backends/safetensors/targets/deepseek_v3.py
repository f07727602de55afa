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
from compiler.ir.graph import Graph, Node, Value
from compiler.weights.evaluate import evaluate

NAME = "deepseek_v3"
THETA = 10000.0
KEPT_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout")
ACTIVATIONS = {
    ("silu", None): "silu",
    ("relu", None): "relu",
    ("gelu", "none"): "gelu",
    ("gelu", "tanh"): "gelu_pytorch_tanh",
}


def propose(graph: Graph) -> Proposal | Refusal:
    """The config that latent attention, norms and MLPs of ``graph`` suggest. Refuses what has no such attention."""
    sites = graph.nodes_named("latent_attention")
    tables = graph.nodes_named("rope_table")
    if not sites:
        return Refusal(NAME, "it has no latent attention")
    if len(tables) != 1:
        return Refusal(NAME, f"it has {len(tables)} rotary tables, and the class has one")
    linears = _inner_linears(graph)
    if linears is None:
        return Refusal(NAME, "it has no gated MLP of linear maps")
    config = {
        "model_type": "deepseek_v3",
        **_sizes(graph, sites),
        **_attention(sites[0]),
        **_dense_stack(len(sites)),
        **linears,
        "rms_norm_eps": _input_norm_eps(sites[0]),
        "tie_word_embeddings": shares_embedding(graph),
        **_rotary(tables[0], graph, sites[0]),
        **_kept(graph),
    }
    return Proposal("DeepseekV3ForCausalLM", config, _notes(sites[0]))


def _sizes(graph: Graph, sites: list[Node]) -> dict[str, Any]:
    table = graph.nodes_named("embedding")[0].input(0)
    vocabulary, width = table.type.static_shape
    return {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": len(sites)}


def _attention(site: Node) -> dict[str, Any]:
    query, latent, rotary, up = (site.input(index) for index in range(4))
    heads, head_width = int(query.shape[1]), int(query.shape[-1])
    rotated = int(rotary.shape[-1])
    key_width = head_width - rotated
    down = _made_by(latent, "linear")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": int(latent.shape[-1]),
        "q_lora_rank": _query_rank(query),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key_width,
        "v_head_dim": int(up.shape[0]) // heads - key_width,
        "rope_interleave": True,
        "attention_bias": down is not None and down.optional_input(2) is not None,
        "attention_dropout": 0.0,
    }


def _dense_stack(layers: int) -> dict[str, Any]:
    """The fields that leave no mixture of experts and no extra prediction module in the class."""
    return {
        "first_k_dense_replace": layers,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 8,
        "num_nextn_predict_layers": 0,
    }


def _inner_linears(graph: Graph) -> dict[str, Any] | None:
    """Inner width and activation of the first product of an activated linear map with another one."""
    for node in graph.nodes_named("mul"):
        makers = [value.node for value in node.inputs if value is not None]
        for gate, up in (makers, makers[::-1]) if len(makers) == 2 else ():
            activation = _activation(gate)
            if activation and gate is not None and up is not None and up.op.name == "linear":
                return {"intermediate_size": int(gate.output.shape[-1]), "hidden_act": activation}
    return None


def _activation(node: Node | None) -> str | None:
    """What transformers calls the activation that ``node`` is, if it is one that the class can have."""
    if node is None:
        return None
    return ACTIVATIONS.get((node.op.name, node.attr("approximate") if "approximate" in node.op.attrs else None))


def _made_by(value: Value, *ops: str) -> Node | None:
    """The nearest node of ``ops`` above ``value`` along first operands."""
    node = value.node
    while node is not None and node.op.name not in ops:
        node = node.inputs[0].node if node.inputs and node.inputs[0] is not None else None
    return node


def _query_rank(query: Value) -> int | None:
    """The width of the latent queries; None when one linear map makes them from the layer's input."""
    up = _made_by(query, "linear")
    norm = up.input(0).node if up else None
    down = norm.input(0).node if norm and norm.op.name == "rms_norm" else None
    return int(down.output.shape[-1]) if down and down.op.name == "linear" else None


def _input_norm_eps(site: Node) -> float:
    down = _made_by(site.input(1), "linear")
    norm = _made_by(down.input(0), "rms_norm") if down else None
    return float(norm.attr("eps")) if norm else 1e-6


def _rotary(table: Node, graph: Graph, site: Node) -> dict[str, Any]:
    frequencies = evaluate([_param_expr(graph, table.input(1))], graph.sources)[0]
    length = int((source_config(graph) or {}).get("max_position_embeddings", 4096))
    factors = _factors(frequencies.float(), int(site.input(2).shape[-1]))
    parameters = {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "factor": 1.0,
        "attention_factor": float(table.attr("scale")),
        "original_max_position_embeddings": length,
        "short_factor": factors,
        "long_factor": factors,
    }
    return {"max_position_embeddings": length, "rope_parameters": parameters}


def _param_expr(graph: Graph, value: Value) -> Any:
    return graph.params[value.name].expr


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


def _notes(site: Node) -> tuple[str, ...]:
    down = _made_by(site.input(1), "linear")
    biased = down is not None and down.optional_input(2) is not None
    runtimes = "transformers 5 loads it; vLLM and SGLang read neither its rotary table nor the norm's epsilon as meant"
    return (runtimes, "its attention has biases, which vLLM's class lacks") if biased else (runtimes,)


TARGET = Target(NAME, propose)
