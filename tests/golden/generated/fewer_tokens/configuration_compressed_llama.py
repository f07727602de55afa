"""Configuration of CompressedLlama, generated from the graph of a compressed LlamaForCausalLM.

For the code of modeling_compressed_llama.py with the digest b8a563157da7d143.
"""

from dataclasses import field

from transformers import PreTrainedConfig


class CompressedLlamaConfig(PreTrainedConfig):
    """Sizes of the model. A list has an entry for each layer."""

    model_type = "compressed_llama"
    keys_to_ignore_at_inference = ["past_key_values"]

    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    max_position_embeddings: int = 64
    vocab_size: int = 96
    hidden_size: int = 48
    num_hidden_layers: int = 4
    rope_frequencies: list[float] = field(default_factory=list)
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 12
    intermediate_size: int = 80
    layer_kinds: list[str] = field(default_factory=list)
    use_cache: bool = True
    tie_word_embeddings: bool = False


__all__ = ["CompressedLlamaConfig"]
