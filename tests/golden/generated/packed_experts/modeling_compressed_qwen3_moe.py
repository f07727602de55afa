"""CompressedQwen3Moe, generated from the graph of a compressed Qwen3MoeForCausalLM."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from .configuration_compressed_qwen3_moe import CompressedQwen3MoeConfig
from .packed_linear import packed_linear


class CompressedQwen3MoeRMSNorm(nn.Module):
    """Divides by the root mean square over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class CompressedQwen3MoeRotaryEmbedding(nn.Module):
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


def past_length(past_key_values: Cache | None, device: torch.device, layer_idx: int = 0) -> int | torch.Tensor:
    """How many tokens are cached; of static caches a tensor, so that what is compiled does for any number."""
    past = past_key_values.get_seq_length(layer_idx) if past_key_values is not None else 0
    return past.to(device) if isinstance(past, torch.Tensor) else past


def token_positions(inputs: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
    """The position of each of the inputs, [batch or 1, length]; padding on the left does not count."""
    length = inputs.shape[1]
    if attention_mask is None or attention_mask.dim() != 2:
        return (torch.arange(length, device=inputs.device) + past_length(cache, inputs.device)).unsqueeze(0)
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]


def causal_mask(
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    layer_idx: int = 0,
    window: int | None = None,
) -> torch.Tensor | None:
    """What each of the inputs may look at, bool [batch or 1, 1, length, keys]; None where that is all up to itself."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    length = inputs.shape[1]
    past = past_length(past_key_values, inputs.device, layer_idx)
    keys, first = (length, 0) if past_key_values is None else past_key_values.get_mask_sizes(length, layer_idx)
    if attention_mask is None and (past_key_values is None or not past_key_values.is_compileable):
        narrow = window is not None and past + length > window
        if not narrow and first + keys == past + length and (length == 1 or past == 0):
            return None
    row = (torch.arange(length, device=inputs.device) + past)[:, None]
    column = torch.arange(first, first + keys, device=inputs.device)[None, :]
    mask = column <= row
    if window is not None:
        mask = mask & (column > row - window)
    mask = mask[None, None]
    if attention_mask is not None:
        present = F.pad(attention_mask, (0, max(first + keys - attention_mask.shape[1], 0)))[:, None, None, :]
        mask = mask & present[..., first : first + keys].bool()
        mask = mask | (column == row)  # padding sees itself, so that no row of scores is empty
    return mask


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of heads that share keys and values: [batch, heads, length, width] to [batch, length, heads, width]."""
    causal = mask is None and query.shape[2] > 1
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return attended.transpose(1, 2)


class PackedWeight(nn.Module):
    """A matrix [rows, columns], or a stack of them, held as codes of a few bits.

    ``weight_packed`` int32 [rows, words] has the codes of each row, little-endian, ``weight_scale`` [rows, groups] a
    scale for each ``group_size`` columns (0: for all), and ``weight_zero_point`` int32 [words, groups] codes of zero
    points, packed along rows. An element is (code - zero point) * scale; without zero points they are in the middle.
    """

    def __init__(self, rows: int, columns: int, bits: int, group_size: int, zero_points: bool, *stack: int) -> None:
        super().__init__()
        self.shape, self.bits = (*stack, rows, columns), bits
        groups = columns // group_size if group_size else 1
        words = torch.zeros(*stack, rows, -(-columns * bits // 32), dtype=torch.int32)
        zeros = torch.zeros(*stack, -(-rows * bits // 32), groups, dtype=torch.int32)
        self.weight_packed = nn.Parameter(words, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(*stack, rows, groups))
        self.weight_zero_point = nn.Parameter(zeros, requires_grad=False) if zero_points else None


class PackedLinear(PackedWeight):
    """A linear map with a packed weight."""

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int, zero_points: bool, bias: bool = False
    ) -> None:
        super().__init__(out_features, in_features, bits, group_size, zero_points)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = packed_linear(x, self.weight_packed, self.weight_scale, self.weight_zero_point, self.bits)
        return y if self.bias is None else y + self.bias


class PackedExperts(PackedWeight):
    """Linear maps with packed weights, one for each expert."""

    def __init__(self, experts: int, rows: int, columns: int, bits: int, group_size: int, zero_points: bool) -> None:
        super().__init__(rows, columns, bits, group_size, zero_points, experts)

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        zeros = None if self.weight_zero_point is None else self.weight_zero_point[expert]
        return packed_linear(x, self.weight_packed[expert], self.weight_scale[expert], zeros, self.bits)


def expert_linear(x: torch.Tensor, weight: torch.Tensor | PackedExperts, expert: int) -> torch.Tensor:
    return F.linear(x, weight[expert]) if isinstance(weight, torch.Tensor) else weight(x, expert)


def run_experts(
    hidden_states: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor | PackedExperts,
    down: torch.Tensor | PackedExperts,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Sum of each token's experts, weighted: [tokens, width], with ``indices`` and ``weights`` [tokens, active]."""
    result = hidden_states.new_zeros(len(hidden_states), down.shape[1])
    for expert in indices.unique().tolist():
        token, slot = torch.where(indices == expert)
        gate, up = expert_linear(hidden_states[token], gate_up, expert).chunk(2, dim=-1)
        output = expert_linear(activation(gate) * up, down, expert)
        result.index_add_(0, token, (output * weights[token, slot, None]).to(result.dtype))
    return result


class CompressedQwen3MoeAttention(nn.Module):
    """Attention to the tokens before."""

    def __init__(self, config: CompressedQwen3MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.q_proj = PackedLinear(
            config.hidden_size,
            config.num_attention_heads * config.head_dim,
            **config.weight_scheme,
        )
        self.q_norm = CompressedQwen3MoeRMSNorm(config.head_dim, eps=1e-06)
        self.k_proj = PackedLinear(
            config.hidden_size,
            config.num_key_value_heads * config.head_dim,
            **config.weight_scheme,
        )
        self.k_norm = CompressedQwen3MoeRMSNorm(config.head_dim, eps=1e-06)
        self.v_proj = PackedLinear(
            config.hidden_size,
            config.num_key_value_heads * config.head_dim,
            **config.weight_scheme,
        )
        self.o_proj = PackedLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            **config.weight_scheme,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        query = self.q_proj(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        key = self.k_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        query = apply_rotary(self.q_norm(query), cos, sin)
        key = apply_rotary(self.k_norm(key), cos, sin)
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self.o_proj(attention(query, key, value, attention_mask, self.scaling).flatten(2))


class CompressedQwen3MoeExperts(nn.Module):
    """Experts, of which each token visits some."""

    def __init__(self, config: CompressedQwen3MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate_up_proj = PackedExperts(
            config.num_experts,
            2 * config.moe_intermediate_size,
            config.hidden_size,
            **config.gate_up_proj_scheme,
        )
        self.down_proj = PackedExperts(
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            **config.down_proj_scheme,
        )

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return run_experts(hidden_states, indices, weights, self.gate_up_proj, self.down_proj, F.silu)


class CompressedQwen3MoeMLP(nn.Module):
    """Chooses experts for each token."""

    def __init__(self, config: CompressedQwen3MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.hidden_size = config.hidden_size
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = CompressedQwen3MoeExperts(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = hidden_states.flatten(0, 1)
        values, indices = self.gate(normed).softmax(dim=-1).topk(self.num_experts_per_tok, dim=-1)
        return self.experts(normed, indices, values).reshape(hidden_states.shape[0], -1, self.hidden_size)


class CompressedQwen3MoeLayer(GradientCheckpointingLayer):
    """One layer of the stack; 30 of them."""

    def __init__(self, config: CompressedQwen3MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = CompressedQwen3MoeRMSNorm(config.hidden_size, eps=1e-06)
        self.self_attn = CompressedQwen3MoeAttention(config, layer_idx)
        self.post_attention_layernorm = CompressedQwen3MoeRMSNorm(config.hidden_size, eps=1e-06)
        self.mlp = CompressedQwen3MoeMLP(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        self_attn_output = self.self_attn(
            self.input_layernorm(hidden_states), cos, sin, attention_mask, past_key_values
        )
        hidden_states = hidden_states + self_attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class CompressedQwen3MoePreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: CompressedQwen3MoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CompressedQwen3MoeLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": CompressedQwen3MoeLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CompressedQwen3MoeRotaryEmbedding):
            init.copy_(module.inv_freq, torch.tensor(module.frequencies, dtype=torch.float32))


class CompressedQwen3MoeModel(CompressedQwen3MoePreTrainedModel):
    """Tokens to hidden states."""

    def __init__(self, config: CompressedQwen3MoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = CompressedQwen3MoeRotaryEmbedding(config.rope_frequencies)
        self.norm = CompressedQwen3MoeRMSNorm(config.hidden_size, eps=1e-06)
        self.layers = nn.ModuleList(
            CompressedQwen3MoeLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Args: ``attention_mask`` [batch, past + length] is 0 where a token is padding."""
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = token_positions(hidden_states, attention_mask, past_key_values)
        mask = causal_mask(hidden_states, attention_mask, past_key_values)
        cos, sin = self.rotary_emb(position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin, mask, past_key_values)
        last_hidden_state = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=last_hidden_state, past_key_values=past_key_values)


class CompressedQwen3MoeForCausalLM(CompressedQwen3MoePreTrainedModel, GenerationMixin):
    """The model with a head that scores the next token."""

    def __init__(self, config: CompressedQwen3MoeConfig) -> None:
        super().__init__(config)
        self.model = CompressedQwen3MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def _get_static_cache_init_shape(self) -> None:
        """Static caches get their sizes from what is first cached, which differs from the sizes of heads."""

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None, **given: Any) -> torch.Tensor | None:
        """The masks of a static cache, whose sizes are the same for every token."""
        return causal_mask(given["inputs_embeds"], attention_mask, given["past_key_values"])

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Args: ``labels`` [batch, length] are token ids, -100 where there is no loss."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


__all__ = ["CompressedQwen3MoeForCausalLM", "CompressedQwen3MoeModel", "CompressedQwen3MoePreTrainedModel"]
