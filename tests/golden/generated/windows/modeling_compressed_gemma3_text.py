"""CompressedGemma3, generated from the graph of a compressed Gemma3ForCausalLM."""

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

from .configuration_compressed_gemma3_text import CompressedGemma3Config
from .latent_decode import latent_decode


class CompressedGemma3RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class CompressedGemma3OffsetRMSNorm(nn.Module):
    """Divides by the root mean square over the last axis; the scale is ``offset`` plus the weight."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return (normed * (self.offset + self.weight.float())).to(x.dtype)


class CompressedGemma3RotaryEmbedding(nn.Module):
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


def apply_interleaved_rotary_to_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (2i, 2i + 1) of each head of x [batch, heads, length, width] and write them to (i, i + n)."""
    cos, sin = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
    turned, passed = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    first, second = turned[..., 0::2], turned[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, passed), dim=-1)


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


def causal_masks(
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | dict[int | None, torch.Tensor | None] | None,
    past_key_values: Cache | None,
    windows: list[int | None],
) -> dict[int | None, torch.Tensor | None]:
    """The mask of each of the windows that layers have."""
    if isinstance(attention_mask, dict):
        return attention_mask
    return {
        window: causal_mask(inputs, attention_mask, past_key_values, windows.index(window), window)
        for window in set(windows)
    }


def _allowed(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mask of scores [batch, heads, length, keys]; without one, each token sees those before it."""
    if mask is not None:
        return mask
    length, keys = scores.shape[2:]
    return torch.ones(length, keys, dtype=torch.bool, device=scores.device).tril(keys - length)


def decodes(query: torch.Tensor) -> bool:
    """Whether a kernel attends with few queries to what is cached, as it is cached."""
    return query.is_cuda and not torch.is_grad_enabled()


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of heads that share keys and values: [batch, heads, length, width] to [batch, length, heads, width]."""
    causal = mask is None and query.shape[2] > 1
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return attended.transpose(1, 2)


def latent_attention(
    query: torch.Tensor,
    latent: torch.Tensor,
    rotary_key: torch.Tensor | None,
    up: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Shapes: query [batch, heads, length, n + R], latent [batch, keys, r], rotary_key [batch, keys, R] (shared by all
    heads), up [heads * (n + v), r] with n key rows and then v value rows for each head; the result is
    [batch, length, heads, v]. With few queries the key rows are multiplied into the query and the value rows into the
    result, so that keys and values are never expanded from their latents.
    """
    heads, length, keys = query.shape[1], query.shape[2], latent.shape[1]
    rotated = 0 if rotary_key is None else rotary_key.shape[-1]
    unrotated, rank = query.shape[-1] - rotated, up.shape[-1]
    width = up.shape[0] // heads
    up = up.view(heads, width, rank)
    key_up, value_up = up[:, :unrotated], up[:, unrotated:]
    if length * keys * (2 * rank - width) > (keys - length) * rank * width:
        expanded = torch.einsum("bsr,hwr->bhsw", latent, up)
        key, value = expanded[..., :unrotated], expanded[..., unrotated:]
        if rotary_key is not None:
            key = torch.cat((key, rotary_key.unsqueeze(1).expand(-1, heads, -1, -1)), dim=-1)
        return attention(query, key, value, mask, scale)
    absorbed = torch.einsum("bhtn,hnr->bhtr", query[..., :unrotated], key_up)
    if decodes(query):
        turned = None if rotary_key is None else query[..., unrotated:].transpose(1, 2)
        inputs = absorbed.transpose(1, 2), turned, latent, rotary_key, scale, mask
        attended = latent_decode(*inputs)
        return torch.einsum("bthr,hvr->bthv", attended, value_up)
    scores = (absorbed.flatten(1, 2) @ latent.transpose(1, 2)).unflatten(1, (heads, length))
    if rotary_key is not None:
        turned = query[..., unrotated:].flatten(1, 2) @ rotary_key.transpose(1, 2)
        scores = scores + turned.unflatten(1, (heads, length))
    scores = scores.float() * scale
    if mask is not None or length > 1:
        scores = scores.masked_fill(~_allowed(scores, mask), torch.finfo(torch.float32).min)
    attended = scores.softmax(dim=-1).to(latent.dtype).flatten(1, 2) @ latent
    return torch.einsum("bhtr,hvr->bthv", attended.unflatten(1, (heads, length)), value_up)


def update_latents(
    cache: Cache, latent: torch.Tensor, rotary_key: torch.Tensor, layer_idx: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All latents and rotary keys [batch, keys, size] with these as the last; the cache has them as one head's."""
    held = cache.update(latent.unsqueeze(1), rotary_key.unsqueeze(1), layer_idx)
    return held[0].squeeze(1), held[1].squeeze(1)


class CompressedGemma3Attention(nn.Module):
    """Attention to keys and values that are made from one latent for each token, which is cached."""

    def __init__(self, config: CompressedGemma3Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_key_value_heads = config.num_key_value_heads
        self.kv_lora_rank = config.kv_lora_rank[layer_idx]
        self.qk_rope_head_dim = config.qk_rope_head_dim[layer_idx]
        self.num_attention_heads = config.num_attention_heads
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.scaling = (config.qk_nope_head_dim + config.qk_rope_head_dim[layer_idx]) ** -0.5
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.k_norm = CompressedGemma3OffsetRMSNorm(config.head_dim, eps=1e-06, offset=1.0)
        self.kv_down = nn.Linear(
            config.num_attention_heads * config.head_dim,
            config.kv_lora_rank[layer_idx] + config.qk_rope_head_dim[layer_idx],
            bias=False,
        )
        self.kv_norm = CompressedGemma3RMSNorm(config.kv_lora_rank[layer_idx], eps=1e-06)
        self.query = nn.Linear(
            config.hidden_size,
            config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim[layer_idx]),
            bias=False,
        )
        self.kv_up = nn.Linear(
            config.kv_lora_rank[layer_idx],
            config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim),
            bias=False,
        )
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        k = self.k_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        x = torch.cat((self.k_norm(k).transpose(1, 2).flatten(2), self.v_proj(hidden_states)), dim=-1)
        projected = self.kv_down(x)
        latent, rotary_key = projected.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        query = self.query(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        query_pass, query_rot = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        query = torch.cat((query_pass, apply_interleaved_rotary_to_half(query_rot, cos, sin)), dim=-1)
        latent = self.kv_norm(latent)
        rotary_key = apply_interleaved_rotary_to_half(rotary_key.unsqueeze(1), cos, sin).squeeze(1)
        if past_key_values is not None:
            latent, rotary_key = update_latents(past_key_values, latent, rotary_key, self.layer_idx)
        attended = latent_attention(query, latent, rotary_key, self.kv_up.weight, attention_mask, self.scaling)
        return self.o_proj(attended.flatten(2))


class CompressedGemma3MLP(nn.Module):
    """Feed-forward, for each token by itself."""

    def __init__(self, config: CompressedGemma3Config, layer_idx: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.gate_proj(hidden_states), approximate="tanh") * self.up_proj(hidden_states)
        return self.down_proj(x)


class CompressedGemma3Layer(GradientCheckpointingLayer):
    """One layer of the stack; 30 of them."""

    def __init__(self, config: CompressedGemma3Config, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = CompressedGemma3OffsetRMSNorm(config.hidden_size, eps=1e-06, offset=1.0)
        self.self_attn = CompressedGemma3Attention(config, layer_idx)
        self.post_attention_layernorm = CompressedGemma3OffsetRMSNorm(config.hidden_size, eps=1e-06, offset=1.0)
        self.pre_feedforward_layernorm = CompressedGemma3OffsetRMSNorm(config.hidden_size, eps=1e-06, offset=1.0)
        self.mlp = CompressedGemma3MLP(config, layer_idx)
        self.post_feedforward_layernorm = CompressedGemma3OffsetRMSNorm(config.hidden_size, eps=1e-06, offset=1.0)

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
        hidden_states = hidden_states + self.post_attention_layernorm(self_attn_output)
        normed = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden_states)))
        return hidden_states + normed


class CompressedGemma3PreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: CompressedGemma3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CompressedGemma3Layer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": CompressedGemma3Layer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CompressedGemma3RotaryEmbedding):
            init.copy_(module.inv_freq, torch.tensor(module.frequencies, dtype=torch.float32))


class CompressedGemma3Model(CompressedGemma3PreTrainedModel):
    """Tokens to hidden states."""

    def __init__(self, config: CompressedGemma3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.full_attention_rotary_emb = CompressedGemma3RotaryEmbedding(config.full_attention_rope_frequencies)
        self.sliding_attention_rotary_emb = CompressedGemma3RotaryEmbedding(config.sliding_attention_rope_frequencies)
        self.norm = CompressedGemma3OffsetRMSNorm(config.hidden_size, eps=1e-06, offset=1.0)
        self.layers = nn.ModuleList(
            CompressedGemma3Layer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
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
        masks = causal_masks(hidden_states, attention_mask, past_key_values, self.config.attention_windows)
        hidden_states = hidden_states * 6.928203105926514
        windows = self.config.attention_windows
        tables = {
            "full_attention_rotary_emb": self.full_attention_rotary_emb(position_ids),
            "sliding_attention_rotary_emb": self.sliding_attention_rotary_emb(position_ids),
        }
        for layer, window, kind in zip(self.layers, windows, self.config.rotary_kinds, strict=True):
            cos, sin = tables[kind]
            hidden_states = layer(hidden_states, cos, sin, masks[window], past_key_values)
        last_hidden_state = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=last_hidden_state, past_key_values=past_key_values)


class CompressedGemma3ForCausalLM(CompressedGemma3PreTrainedModel, GenerationMixin):
    """The model with a head that scores the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CompressedGemma3Config) -> None:
        super().__init__(config)
        self.model = CompressedGemma3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def _get_static_cache_init_shape(self) -> None:
        """Static caches get their sizes from what is first cached, which differs from the sizes of heads."""

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None, **given: Any) -> dict[int | None, Any]:
        """The masks of a static cache, whose sizes are the same for every token."""
        return causal_masks(
            given["inputs_embeds"], attention_mask, given["past_key_values"], self.config.attention_windows
        )

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


__all__ = ["CompressedGemma3ForCausalLM", "CompressedGemma3Model", "CompressedGemma3PreTrainedModel"]
