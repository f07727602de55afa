"""Configuration of CompressedViT, generated from the graph of a compressed ViTForImageClassification.

For the code of modeling_compressed_vit.py with the digest f79f97059da3406e.
"""

from transformers import PreTrainedConfig


class CompressedViTConfig(PreTrainedConfig):
    """Sizes of the model."""

    model_type = "compressed_vit"
    keys_to_ignore_at_inference = ["past_key_values"]

    initializer_range: float = 0.02
    num_hidden_layers: int = 3
    hidden_size: int = 48
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 12
    intermediate_size: int = 80
    image_size: int = 24
    num_channels: int = 3
    tie_word_embeddings: bool = False


__all__ = ["CompressedViTConfig"]
