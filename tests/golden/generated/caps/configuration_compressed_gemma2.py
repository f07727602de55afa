"""Configuration of CompressedGemma2, generated from the graph of a compressed Gemma2ForCausalLM.

For the code of modeling_compressed_gemma2.py with the digest bf3aa3b1ff39886c.
"""

from dataclasses import field

from transformers import PreTrainedConfig


class CompressedGemma2Config(PreTrainedConfig):
    """Sizes of the model. A list has an entry for each layer."""

    model_type = "compressed_gemma2"
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
    num_attention_heads: int = 4
    kv_lora_rank: int = 20
    qk_rope_head_dim: int = 8
    qk_nope_head_dim: int = 8
    v_head_dim: int = 16
    intermediate_size: int = 80
    use_cache: bool = True
    attention_windows: list[int | None] = field(default_factory=list)
    layer_types: list[str] = field(default_factory=list)
    sliding_window: int = 5
    cache_bits: int = 4
    tie_word_embeddings: bool = True


__all__ = ["CompressedGemma2Config"]
