"""Tiny random models whose language model reads pictures or sound as well: captured for texts alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCABULARY, PLACE = 96, 90
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "pad_token_id": 0}
VISION: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
GEMMA: dict[str, Any] = {"vision_config": VISION, "mm_tokens_per_image": 4}
AXES = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
SOUND: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": 50}


def _text(kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **TEXT, **more}


def _vision(kind: str) -> dict[str, Any]:
    return {"model_type": kind, **VISION}


def _of(name: str, text: dict[str, Any], **others: Any) -> Callable[[], Any]:
    """A builder of ``<name>ForConditionalGeneration`` with a seed of its own."""

    def build() -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(text_config=text, **others)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()

    return build


idefics2 = _of(
    "Idefics2",
    _text("mistral"),
    vision_config=VISION,
    perceiver_config={"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
                      "resampler_head_dim": 8, "num_key_value_heads": 2},
    image_token_id=PLACE,
)  # fmt: skip
MULTIMODAL: dict[str, Callable[[], Any]] = {
    "llava": _of("Llava", _text("llama"), vision_config=_vision("clip_vision_model"), image_token_index=PLACE),
    "llava_next": _of("LlavaNext", _text("llama"), vision_config=_vision("clip_vision_model"), image_token_index=PLACE),
    "llava_onevision": _of(
        "LlavaOnevision", _text("qwen2"), vision_config=_vision("siglip_vision_model"), image_token_index=PLACE
    ),
    "gemma3": _of("Gemma3", {**TEXT, "head_dim": 16}, **GEMMA, image_token_id=PLACE),
    "gemma3, pictures beyond the vocabulary": _of(
        "Gemma3", {**TEXT, "head_dim": 16}, **GEMMA, image_token_id=VOCABULARY + 1
    ),
    "mistral3": _of("Mistral3", _text("mistral"), vision_config=_vision("pixtral"), image_token_index=PLACE),
    "smolvlm": _of("SmolVLM", _text("llama"), vision_config=VISION, image_token_id=PLACE),
    "idefics3": _of("Idefics3", _text("llama"), vision_config=VISION, image_token_id=PLACE),
    "internvl": _of(
        "InternVL",
        _text("qwen2"),
        vision_config={**SIZES, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=PLACE,
    ),
    "aya_vision": _of(
        "AyaVision", _text("cohere2"), vision_config=_vision("siglip_vision_model"), image_token_index=PLACE
    ),
    "qwen2_vl": _of(
        "Qwen2VL",
        {**TEXT, "rope_parameters": AXES},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": _of(
        "Qwen2_5_VL",
        {**TEXT, "rope_parameters": AXES},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32},
    ),
    "qwen3_vl": _of(
        "Qwen3VL",
        {**TEXT, "head_dim": 8, "rope_parameters": AXES},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [1],
        },
    ),
    "qwen2_audio": _of(
        "Qwen2Audio",
        _text("qwen2"),
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            **SOUND,
        },
        audio_token_index=PLACE,
    ),
    "voxtral": _of(
        "Voxtral",
        _text("llama"),
        audio_config={"model_type": "voxtral_encoder", **SIZES, "intermediate_size": 128, **SOUND},
        audio_token_id=PLACE,
    ),
}
