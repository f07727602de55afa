"""Configuration of CompressedModernBert, generated from the graph of a compressed ModernBertForMaskedLM.

For the code of modeling_compressed_modernbert.py with the digest 91f89d838ff86c0e.
"""

from dataclasses import field

from transformers import PreTrainedConfig


class CompressedModernBertConfig(PreTrainedConfig):
    """Sizes of the model. A list has an entry for each layer."""

    model_type = "compressed_modernbert"
    keys_to_ignore_at_inference = ["past_key_values"]

    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    max_position_embeddings: int = 64
    vocab_size: int = 96
    hidden_size: int = 48
    num_hidden_layers: int = 3
    full_attention_rope_frequencies: list[float] = field(default_factory=list)
    sliding_attention_rope_frequencies: list[float] = field(default_factory=list)
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 12
    intermediate_size: int = 80
    layer_inputs: list[int] = field(default_factory=list)
    layer_kinds: list[str] = field(default_factory=list)
    tie_word_embeddings: bool = True


__all__ = ["CompressedModernBertConfig"]
