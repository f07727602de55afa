"""A tiny random model of every supported family, for laws that must hold on all of them.

``FAMILIES["llama"].config()`` is a transformers config, ``.build(seed)`` a random float32 model in eval mode, and
``.inputs(batch, tokens, seed)`` inputs for it. Sizes are odd enough that a swapped axis shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 96


@dataclass(frozen=True)
class Family:
    """One model family: how to configure a tiny one, build it and feed it."""

    name: str
    model_type: str
    architecture: str
    options: dict[str, Any]
    layers: Callable[[int], dict[str, Any]]
    kind: str = "text"
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self, layers: int = 2, **changes: Any) -> Any:
        from transformers import AutoConfig

        options = {**self.options, **self.layers(layers), **changes}
        config = AutoConfig.for_model(self.model_type, **options)
        config.architectures = [self.architecture]
        config.use_cache = False
        return config

    def build(self, seed: int = 0, layers: int = 2, **changes: Any) -> Any:
        """A random model. Vectors (norms, biases) are random too, so that none of them is neutral."""
        import transformers

        torch.manual_seed(seed)
        model = getattr(transformers, self.architecture)(self.config(layers, **changes)).eval()
        generator = torch.Generator().manual_seed(seed)
        persistent = set(model.state_dict())
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name in persistent and tensor.is_floating_point():
                    noise = torch.randn(tensor.shape, generator=generator)
                    tensor.copy_(noise * 0.15 if tensor.dim() > 1 else 0.5 + 0.2 * noise)
        return model

    def inputs(self, batch: int = 2, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs; images and audio have their one fixed size whatever ``tokens`` says."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
        if self.kind == "image":
            return {"pixel_values": torch.randn(batch, 3, 24, 24, generator=generator)}
        if self.kind == "audio":
            features = torch.randn(batch, 8, 2 * self.options["max_source_positions"], generator=generator)
            return {"input_features": features, "decoder_input_ids": ids}
        if self.kind == "translation":
            source = torch.randint(3, VOCABULARY, (batch, tokens + 2), generator=generator)
            return {"input_ids": source, "decoder_input_ids": ids}
        return {"input_ids": ids}


def _hidden_layers(count: int) -> dict[str, Any]:
    return {"num_hidden_layers": count}


_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDTHS = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4}
_DECODER = {**_IDS, **_WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 64}
_WIDE_HEADS = {**_DECODER, "head_dim": 16}
_MHA = {**_IDS, **_WIDTHS, "max_position_embeddings": 64}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_IMAGE = {**_WIDTHS, "image_size": 24, "patch_size": 8, "num_channels": 3}
_LATENT = {
    **_DECODER,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 80,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
_WHISPER = {
    **_IDS,
    "d_model": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "num_mel_bins": 8,
    "max_source_positions": 15,
    "max_target_positions": 64,
    "decoder_start_token_id": 1,
}


def _text(name: str, architecture: str, options: dict[str, Any], model_type: str = "", **more: Any) -> Family:
    return Family(name, model_type or name, architecture, {**options, **more}, _hidden_layers)


def _image(name: str, architecture: str, model_type: str = "", **more: Any) -> Family:
    return Family(name, model_type or name, architecture, {**_IMAGE, **more}, _hidden_layers, "image")


def _alternating(window: str, full: str, every: int) -> Callable[[int], dict[str, Any]]:
    def layers(count: int) -> dict[str, Any]:
        kinds = [full if (index + 1) % every == 0 else window for index in range(count)]
        return {"num_hidden_layers": count, "layer_types": kinds}

    return layers


_SLIDING = _alternating("sliding_attention", "full_attention", 2)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _text("llama", "LlamaForCausalLM", _DECODER),
        _text("mistral", "MistralForCausalLM", _DECODER, sliding_window=5),
        _text("qwen2", "Qwen2ForCausalLM", _DECODER),
        _text("qwen3", "Qwen3ForCausalLM", _WIDE_HEADS),
        _text("gemma", "GemmaForCausalLM", _WIDE_HEADS),
        Family("gemma2", "gemma2", "Gemma2ForCausalLM", {**_WIDE_HEADS, "sliding_window": 5}, _SLIDING),
        Family("gemma3", "gemma3_text", "Gemma3ForCausalLM", {**_WIDE_HEADS, "sliding_window": 5}, _SLIDING),
        _text("phi3", "Phi3ForCausalLM", _DECODER),
        _text("olmo2", "Olmo2ForCausalLM", _DECODER),
        _text(
            "granite",
            "GraniteForCausalLM",
            _DECODER,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            attention_multiplier=0.2,
            logits_scaling=2.0,
        ),
        Family("cohere2", "cohere2", "Cohere2ForCausalLM", {**_DECODER, "sliding_window": 5}, _SLIDING),
        _text("smollm3", "SmolLM3ForCausalLM", _DECODER, no_rope_layer_interval=2),
        Family(
            "gpt2",
            "gpt2",
            "GPT2LMHeadModel",
            {
                "vocab_size": VOCABULARY,
                "n_embd": 48,
                "n_head": 4,
                "n_positions": 64,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            lambda count: {"n_layer": count},
        ),
        _text("gpt_neox", "GPTNeoXForCausalLM", _MHA, rotary_pct=0.5),
        Family(
            "opt",
            "opt",
            "OPTForCausalLM",
            {
                **_IDS,
                "hidden_size": 48,
                "ffn_dim": 80,
                "num_attention_heads": 4,
                "word_embed_proj_dim": 48,
                "max_position_embeddings": 64,
            },
            _hidden_layers,
        ),
        _text("bert", "BertForMaskedLM", _MHA),
        _text("roberta", "RobertaForMaskedLM", _MHA),
        Family(
            "modernbert",
            "modernbert",
            "ModernBertForMaskedLM",
            {**_MHA, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2},
            _SLIDING,
        ),
        _image("vit", "ViTForImageClassification"),
        _image("deit", "DeiTForImageClassification"),
        _image("dinov2", "Dinov2ForImageClassification"),
        _image("clip_vision", "CLIPVisionModel", "clip_vision_model"),
        _text("clip_text", "CLIPTextModel", _MHA, "clip_text_model"),
        _image("siglip_vision", "SiglipVisionModel", "siglip_vision_model"),
        _text("siglip_text", "SiglipTextModel", _MHA, "siglip_text_model", projection_size=48),
        Family(
            "t5",
            "t5",
            "T5ForConditionalGeneration",
            _T5,
            lambda count: {"num_layers": count, "num_decoder_layers": count},
            "translation",
        ),
        Family(
            "whisper",
            "whisper",
            "WhisperForConditionalGeneration",
            _WHISPER,
            lambda count: {"encoder_layers": count, "decoder_layers": count},
            "audio",
        ),
        _text("mixtral", "MixtralForCausalLM", _DECODER, num_local_experts=4, num_experts_per_tok=2),
        _text("qwen3_moe", "Qwen3MoeForCausalLM", _WIDE_HEADS, **_EXPERTS),
        Family(
            "gpt_oss",
            "gpt_oss",
            "GptOssForCausalLM",
            {
                **_WIDE_HEADS,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 5,
                "attention_bias": True,
            },
            _SLIDING,
        ),
        _text("deepseek_v2", "DeepseekV2ForCausalLM", _LATENT, topk_method="group_limited_greedy"),
        _text("deepseek_v3", "DeepseekV3ForCausalLM", _LATENT),
    )
}
