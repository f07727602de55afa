"""CompressedModernBert, generated from the graph of a compressed ModernBertForMaskedLM."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_compressed_modernbert import CompressedModernBertConfig


class CompressedModernBertRotaryEmbedding(nn.Module):
    """Cosines and sines of position times frequency, [batch, length, pairs] each, in float32."""

    inv_freq: torch.Tensor

    def __init__(self, frequencies: list[float], scale: float = 1.0) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.scale = scale
        self.register_buffer("inv_freq", torch.tensor(frequencies, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.float()
        return angles.cos() * self.scale, angles.sin() * self.scale


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + n) of the first 2n elements of each head of x [batch, heads, length, width]."""
    cos, sin = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
    pairs = cos.shape[-1]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., 2 * pairs :]), dim=-1)


def padding_mask(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, window: int | None = None
) -> torch.Tensor | None:
    """What each token may look at, bool [batch or 1, 1, 1 or length, length]; None where that is everything."""
    length = input_ids.shape[1]
    mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
    if window is None or window >= length:
        return mask
    place = torch.arange(length, device=input_ids.device)
    near = ((place[:, None] - place[None, :]).abs() < window)[None, None]
    return near if mask is None else near & mask | torch.eye(length, dtype=torch.bool, device=input_ids.device)


def full_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention to all that is not masked: [batch, heads, length, width] to [batch, length, heads, width]."""
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2)


class CompressedModernBertEmbeddings(nn.Module):
    """From tokens or places in the input to vectors."""

    def __init__(self, config: CompressedModernBertConfig) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-05, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tok_embeddings(input_ids))


class CompressedModernBertAttention(nn.Module):
    """Attention among tokens."""

    def __init__(self, config: CompressedModernBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.Wo = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        query = self.q_proj(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        key = self.k_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        query = apply_rotary(query, cos, sin)
        key = apply_rotary(key, cos, sin)
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        return self.Wo(full_attention(query, key, value, attention_mask, self.scaling).flatten(2))


class CompressedModernBertMLP(nn.Module):
    """Feed-forward, for each token by itself."""

    def __init__(self, config: CompressedModernBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.Wo = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.Wo(F.gelu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class CompressedModernBertLayer(GradientCheckpointingLayer):
    """One layer of the stack; 1 of them."""

    def __init__(self, config: CompressedModernBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn = CompressedModernBertAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=1e-05, bias=False)
        self.mlp = CompressedModernBertMLP(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(hidden_states, cos, sin, attention_mask)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class CompressedModernBertLayer2(GradientCheckpointingLayer):
    """One layer of the stack; 2 of them."""

    def __init__(self, config: CompressedModernBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.hidden_size, eps=1e-05, bias=False)
        self.attn = CompressedModernBertAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=1e-05, bias=False)
        self.mlp = CompressedModernBertMLP(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.attn_norm(hidden_states), cos, sin, attention_mask)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class CompressedModernBertModel(nn.Module):
    """The layers, one after another."""

    def __init__(self, config: CompressedModernBertConfig) -> None:
        super().__init__()
        self.layer_inputs = config.layer_inputs
        self.embeddings = CompressedModernBertEmbeddings(config)
        self.full_attention_rotary_emb = CompressedModernBertRotaryEmbedding(config.full_attention_rope_frequencies)
        self.sliding_attention_rotary_emb = CompressedModernBertRotaryEmbedding(
            config.sliding_attention_rope_frequencies,
        )
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=1e-05, bias=False)
        kinds = {"Layer": CompressedModernBertLayer, "Layer2": CompressedModernBertLayer2}
        self.layers = nn.ModuleList(kinds[kind](config, layer_idx) for layer_idx, kind in enumerate(config.layer_kinds))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attention_mask_2: torch.Tensor | None,
    ) -> torch.Tensor:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        cos, sin = self.full_attention_rotary_emb(position_ids)
        cos_2, sin_2 = self.sliding_attention_rotary_emb(position_ids)
        hidden_states = self.embeddings(input_ids)
        choices = ((cos_2, sin_2, attention_mask), (cos, sin, attention_mask_2))
        for layer, choice in zip(self.layers, self.layer_inputs, strict=True):
            cos, sin, attention_mask = choices[choice]
            hidden_states = layer(hidden_states, cos, sin, attention_mask)
        return self.final_norm(hidden_states)


class CompressedModernBertHead(nn.Module):
    """Feed-forward, for each token by itself."""

    def __init__(self, config: CompressedModernBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-05, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.dense(hidden_states)))


class CompressedModernBertPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: CompressedModernBertConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CompressedModernBertLayer", "CompressedModernBertLayer2"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CompressedModernBertRotaryEmbedding):
            init.copy_(module.inv_freq, torch.tensor(module.frequencies, dtype=torch.float32))


class CompressedModernBertForMaskedLM(CompressedModernBertPreTrainedModel):
    """The whole model."""

    _tied_weights_keys = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}

    def __init__(self, config: CompressedModernBertConfig) -> None:
        super().__init__(config)
        self.model = CompressedModernBertModel(config)
        self.head = CompressedModernBertHead(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        mask_4 = padding_mask(input_ids, attention_mask, 4)
        mask = padding_mask(input_ids, attention_mask)
        logits = self.decoder(self.head(self.model(input_ids, mask_4, mask)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return MaskedLMOutput(loss=loss, logits=logits)


__all__ = ["CompressedModernBertForMaskedLM", "CompressedModernBertPreTrainedModel"]
