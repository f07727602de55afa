"""Configuration of CompressedWhisper, generated from the graph of a compressed WhisperForConditionalGeneration.

For the code of modeling_compressed_whisper.py with the digest 78694b9a78681456.
"""

from dataclasses import field

from transformers import PreTrainedConfig


class CompressedWhisperConfig(PreTrainedConfig):
    """Sizes of the model. A list has an entry for each layer."""

    model_type = "compressed_whisper"
    keys_to_ignore_at_inference = ["past_key_values"]

    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    vocab_size: int = 96
    hidden_size: int = 48
    encoder_num_hidden_layers: int = 15
    decoder_num_hidden_layers: int = 15
    max_source_positions: int = 15
    max_target_positions: int = 64
    encoder_num_attention_heads: int = 4
    encoder_num_key_value_heads: int = 4
    encoder_head_dim: int = 12
    decoder_num_attention_heads: int = 4
    decoder_num_key_value_heads: int = 4
    decoder_head_dim: int = 12
    decoder_kv_lora_rank: list[int] = field(default_factory=list)
    decoder_qk_rope_head_dim: int = 0
    decoder_qk_nope_head_dim: int = 8
    decoder_v_head_dim: int = 12
    encoder_intermediate_size: int = 80
    decoder_intermediate_size: int = 80
    decoder_layer_kinds: list[str] = field(default_factory=list)
    is_encoder_decoder: bool = True
    use_cache: bool = True
    decoder_start_token_id: int = 1
    num_mel_bins: int = 8
    tie_word_embeddings: bool = True


__all__ = ["CompressedWhisperConfig"]
