"""What llama.cpp calls the architecture of a transformers config, and the sizes that its files carry.

An architecture is code in llama.cpp: what a config says beyond these keys must be what that code does, or the file
would compute something else. ``fixed`` lists such entries with the values that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backends.gguf import rotary
from backends.gguf.header import Metadata
from backends.gguf.rotary import head_width

Config = Mapping[str, Any]

SILU, GELU_TANH = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_tanh")


@dataclass(frozen=True)
class Architecture:
    """``interleaved``: rotary pairs lie side by side, so rows of queries and keys are permuted. ``shifted``: gains of
    norms are stored plus one. ``turned``: matrices whose names end so are [in, out] in checkpoints. ``unread``: modules
    that llama.cpp leaves out. ``sizes`` are entries of the header with what configs call them, ``more`` further ones;
    ``reason`` says why a config does not fit ("": it does)."""

    name: str
    interleaved: bool = False
    shifted: bool = False
    rotary: bool = True
    turned: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    sizes: Mapping[str, str] = field(default_factory=lambda: COMMON)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    more: Callable[[Config], Metadata] = lambda config: {}
    reason: Callable[[Config], str] = lambda config: ""


NORM_EPSILON = "attention.layer_norm_rms_epsilon"
COMMON = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    NORM_EPSILON: "rms_norm_eps",
    "vocab_size": "vocab_size",
}
ENCODER = {
    **{name: key for name, key in COMMON.items() if name not in ("attention.head_count_kv", NORM_EPSILON)},
    "attention.layer_norm_epsilon": "layer_norm_eps",
}
GPT2 = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
}
EXPERTS = {
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
}
TYPES = "tokenizer.ggml.token_type_count"
FLOATS = (NORM_EPSILON, "attention.layer_norm_epsilon")


def metadata_of(architecture: Architecture, config: Config) -> Metadata:
    """The entries of the header that say what sizes the model has."""
    sizes = architecture.sizes
    found: dict[str, Any] = {name: config[key] for name, key in sizes.items() if config.get(key) is not None}
    found |= {name: float(found[name]) for name in FLOATS if name in found}
    for name, keys in EXPERTS.items():
        given = [config[key] for key in keys if config.get(key) is not None]
        found |= {name: given[0]} if given else {}
    if architecture.rotary:
        found |= {"attention.key_length": head_width(config), "attention.value_length": head_width(config)}
        found |= rotary.metadata(config)
    found |= architecture.more(config)
    types = {TYPES: config["type_vocab_size"]} if config.get("type_vocab_size") is not None else {}
    return {f"{architecture.name}.{name}": value for name, value in found.items()} | types


def refusal(architecture: Architecture, config: Config) -> str:
    """Why the architecture does not compute what ``config`` says; "" where it does."""
    for key, values in architecture.fixed.items():
        if config.get(key) is not None and config[key] not in values:
            return f"its architecture {architecture.name} has no `{key}: {config[key]}`"
    scaled = rotary.refusal(architecture.name, config) if architecture.rotary else ""
    return scaled or architecture.reason(config)


def _capped(config: Config) -> dict[str, Any]:
    """Sliding windows and caps of scores, as Gemma has them."""
    found: dict[str, Any] = {"attention.sliding_window": config["sliding_window"]}
    caps = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
    return found | {name: float(config[key]) for name, key in caps.items() if config.get(key)}


def _multiplied(config: Config) -> dict[str, Any]:
    """What Granite multiplies."""
    return {
        "logit_scale": float(config["logits_scaling"]),
        "residual_scale": float(config["residual_multiplier"]),
        "embedding_scale": float(config["embedding_multiplier"]),
        "attention.scale": float(config["attention_multiplier"]),
    }


def _kinds(config: Config, period: int) -> Sequence[str]:
    """The kinds of attention of layers where every ``period``-th is full."""
    count = range(1, config["num_hidden_layers"] + 1)
    return ["sliding_attention" if index % period else "full_attention" for index in count]


def _gemma(period: int, local: float | None) -> Callable[[Config], str]:
    def reason(config: Config) -> str:
        if list(config.get("layer_types") or _kinds(config, period)) != _kinds(config, period):
            return f"its layers do not have full attention in every {'2nd' if period == 2 else f'{period}th'}"
        if config.get("query_pre_attn_scalar", head_width(config)) != head_width(config):
            return "its scores are scaled by something else than a head's width"
        own = (config.get("rope_parameters") or {}).get("sliding_attention", {})
        if local is not None and float(own.get("rope_theta", local)) != local:
            return f"its layers with windows have another rotary base than {local:g}"
        return ""

    return reason


def _dense(config: Config) -> str:
    sparse = config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers")
    return "some of its layers have no experts" if sparse else ""


def _gpt2(config: Config) -> dict[str, Any]:
    return {"feed_forward_length": config.get("n_inner") or 4 * config["n_embd"]}


_LLAMA = {"hidden_act": SILU, "attention_bias": (False,), "mlp_bias": (False,)}
_QWEN3 = {"hidden_act": SILU, "attention_bias": (False,)}
_BERT = {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "is_decoder": (False,)}
_GPT2 = {
    "activation_function": ("gelu_new", *GELU_TANH),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_GEMMA = {"hidden_activation": GELU_TANH, "attention_bias": (False,), "use_bidirectional_attention": (False,)}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", interleaved=True, fixed=_LLAMA),
    "mistral": Architecture("llama", interleaved=True, fixed=_LLAMA),
    "mixtral": Architecture("llama", interleaved=True, fixed=_LLAMA),
    "qwen2": Architecture("qwen2", fixed={"hidden_act": SILU}),
    "qwen3": Architecture("qwen3", fixed=_QWEN3),
    "qwen3_moe": Architecture("qwen3moe", fixed={**_QWEN3, "norm_topk_prob": (True,)}, reason=_dense),
    "phi3": Architecture("phi3", fixed={"hidden_act": SILU}),
    "olmo2": Architecture("olmo2", fixed=_QWEN3),
    "granite": Architecture("granite", interleaved=True, fixed=_LLAMA, more=_multiplied),
    "bert": Architecture(
        "bert",
        rotary=False,
        fixed=_BERT,
        sizes=ENCODER,
        unread=("pooler",),
        more=lambda config: {"attention.causal": False},
    ),
    "gpt2": Architecture(
        "gpt2",
        rotary=False,
        fixed=_GPT2,
        sizes=GPT2,
        more=_gpt2,
        turned=("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"),
    ),
    "gemma": Architecture("gemma", shifted=True, fixed={"hidden_act": (*GELU_TANH, "gelu"), **_GEMMA}),
    "gemma2": Architecture("gemma2", shifted=True, fixed=_GEMMA, more=_capped, reason=_gemma(2, None)),
    "gemma3_text": Architecture("gemma3", shifted=True, fixed=_GEMMA, more=_capped, reason=_gemma(6, 10000.0)),
}
"""By the ``model_type`` of a config."""
