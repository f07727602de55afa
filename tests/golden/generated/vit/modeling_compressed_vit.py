"""CompressedViT, generated from the graph of a compressed ViTForImageClassification."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput

from .configuration_compressed_vit import CompressedViTConfig


def full_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention to all that is not masked: [batch, heads, length, width] to [batch, length, heads, width]."""
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2)


class CompressedViTPatchEmbeddings(nn.Module):
    """From pixels or frames to vectors."""

    def __init__(self, config: CompressedViTConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 48, kernel_size=8, stride=8)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class CompressedViTEmbeddings(nn.Module):
    """A part of the model that only has parts."""

    def __init__(self, config: CompressedViTConfig) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.patch_embeddings = CompressedViTPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.empty(1, 10, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.cls_token.expand(pixel_values.shape[0], -1, -1)
        return torch.cat((x, self.patch_embeddings(pixel_values)), dim=1) + self.position_embeddings


class CompressedViTAttention(nn.Module):
    """Attention among tokens."""

    def __init__(self, config: CompressedViTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=True)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=True)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.q_proj(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        key = self.k_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        return self.o_proj(full_attention(query, key, value, None, self.scaling).flatten(2))


class CompressedViTMLP(nn.Module):
    """Feed-forward, for each token by itself."""

    def __init__(self, config: CompressedViTConfig, layer_idx: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class CompressedViTLayer(GradientCheckpointingLayer):
    """One layer of the stack; 3 of them."""

    def __init__(self, config: CompressedViTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.attention = CompressedViTAttention(config, layer_idx)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.mlp = CompressedViTMLP(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.attention(self.layernorm_before(hidden_states)) + hidden_states
        return self.mlp(self.layernorm_after(hidden_states)) + hidden_states


class CompressedViTVit(nn.Module):
    """The layers, one after another."""

    def __init__(self, config: CompressedViTConfig) -> None:
        super().__init__()
        self.embeddings = CompressedViTEmbeddings(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.layers = nn.ModuleList(
            CompressedViTLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.layernorm(hidden_states)


class CompressedViTPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: CompressedViTConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CompressedViTLayer"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CompressedViTEmbeddings):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class CompressedViTForImageClassification(CompressedViTPreTrainedModel):
    """The whole model."""

    def __init__(self, config: CompressedViTConfig) -> None:
        super().__init__(config)
        self.vit = CompressedViTVit(config)
        self.classifier = nn.Linear(config.hidden_size, 2, bias=True)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        logits = self.classifier(self.vit(pixel_values)[:, :1].squeeze(1))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


__all__ = ["CompressedViTForImageClassification", "CompressedViTPreTrainedModel"]
