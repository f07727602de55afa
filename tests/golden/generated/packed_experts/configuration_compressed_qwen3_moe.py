"""Configuration of CompressedQwen3Moe, generated from the graph of a compressed Qwen3MoeForCausalLM.

For the code of modeling_compressed_qwen3_moe.py with the digest 2c82e3d44ff6b07d.
"""

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig


class CompressedQwen3MoeConfig(PreTrainedConfig):
    """Sizes of the model. A list has an entry for each layer."""

    model_type = "compressed_qwen3_moe"
    keys_to_ignore_at_inference = ["past_key_values"]

    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    max_position_embeddings: int = 64
    vocab_size: int = 96
    hidden_size: int = 48
    num_hidden_layers: int = 30
    rope_frequencies: list[float] = field(default_factory=list)
    weight_scheme: dict[str, Any] = field(default_factory=dict)
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    num_experts: int = 4
    moe_intermediate_size: int = 24
    num_experts_per_tok: int = 2
    gate_up_proj_scheme: dict[str, Any] = field(default_factory=dict)
    down_proj_scheme: dict[str, Any] = field(default_factory=dict)
    use_cache: bool = True
    tie_word_embeddings: bool = False


__all__ = ["CompressedQwen3MoeConfig"]
