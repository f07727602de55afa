"""Configuration of CompressedT5, generated from the graph of a compressed T5ForConditionalGeneration.

For the code of modeling_compressed_t5.py with the digest ae050b7d225795a5.
"""

from transformers import PreTrainedConfig


class CompressedT5Config(PreTrainedConfig):
    """Sizes of the model."""

    model_type = "compressed_t5"
    keys_to_ignore_at_inference = ["past_key_values"]

    initializer_range: float = 0.02
    eos_token_id: int = 1
    pad_token_id: int = 0
    vocab_size: int = 96
    hidden_size: int = 48
    encoder_num_hidden_layers: int = 15
    decoder_num_hidden_layers: int = 15
    encoder_num_attention_heads: int = 4
    encoder_num_key_value_heads: int = 4
    encoder_head_dim: int = 12
    decoder_num_attention_heads: int = 4
    decoder_num_key_value_heads: int = 4
    decoder_head_dim: int = 12
    encoder_intermediate_size: int = 80
    decoder_intermediate_size: int = 80
    is_encoder_decoder: bool = True
    use_cache: bool = True
    decoder_start_token_id: int = 0
    tie_word_embeddings: bool = True


__all__ = ["CompressedT5Config"]
