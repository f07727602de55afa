"""CompressedLlama, generated from the graph of a compressed LlamaForCausalLM."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from .configuration_compressed_llama import CompressedLlamaConfig


class CompressedLlamaRMSNorm(nn.Module):
    """Divides by the root mean square over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class CompressedLlamaRotaryEmbedding(nn.Module):
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


def take_tokens(x: torch.Tensor, index: torch.Tensor, axis: int = 1) -> torch.Tensor:
    """x at the places ``index`` [batch, kept] along ``axis``, for each sample its own."""
    shape = [1] * x.dim()
    shape[0], shape[axis] = index.shape
    sizes = [len(index), *x.shape[1:axis], index.shape[1], *x.shape[axis + 1 :]]
    return x.expand(len(index), *x.shape[1:]).gather(axis, index.reshape(shape).expand(sizes))


def present_tokens(
    inputs: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
) -> torch.Tensor:
    """Which of the inputs are no padding, bool [batch, length]."""
    if past_key_values is not None and past_key_values.is_compileable:
        raise ValueError("layers keep caches of different lengths, which a static cache cannot hold")
    if attention_mask is None:
        return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    return attention_mask[:, -inputs.shape[1] :].bool()


def prompt_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    present: torch.Tensor,
    scale: float,
    rows: str = "all",
    step: int = 1,
    causal: bool = False,
) -> torch.Tensor:
    """The attention [batch, length] that each key of a prompt gets, mean over heads and its first query, last, or all.

    query [batch, heads, length, width], key [batch, groups, length, width]; of all queries each ``step``-th counts.
    ``present`` [batch, length] tells tokens from padding.
    """
    length = query.shape[2]
    key, place = key[:, :, -length:], torch.arange(length, device=query.device)
    if rows == "all":
        own, counted = place[None, ::step], present[:, ::step]
    else:
        last = torch.where(present, place, -1 if rows == "last" else length)
        own = (last.amax(1) if rows == "last" else last.amin(1)).clamp(0, length - 1)[:, None]
        counted = torch.ones_like(own, dtype=torch.bool)
    picked = own[:, None, :, None].expand(len(query), query.shape[1], -1, query.shape[3])
    scores = query.gather(2, picked).unflatten(1, (key.shape[1], -1)) @ key.unsqueeze(2).transpose(-1, -2) * scale
    seen = present[:, None, :] & (place <= own[..., None]) if causal else present[:, None, :]
    scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
    shares = scores.softmax(dim=-1).mean(dim=(1, 2)) * counted[..., None]
    return shares.sum(1) / counted.sum(1, keepdim=True)


def select_prompt_tokens(
    scores: torch.Tensor,
    present: torch.Tensor,
    keep: torch.Tensor,
    past_key_values: Cache | None,
    layer_idx: int,
    prefix: int = 0,
    suffix: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The places [batch, kept] of a prompt's tokens that go on, in order, and which of them are their sample's own.

    ``present`` [batch, length] tells tokens from padding; each sample goes on with ``keep`` [batch] of its tokens: the
    last ``suffix``, the first ``prefix``, and those with the largest scores. What comes after a prompt all goes on.
    """
    length = present.shape[1]
    if past_key_values is not None and past_key_values.get_seq_length(layer_idx) > length:
        return torch.arange(length, device=present.device).expand(len(present), -1), present
    count, place = present.sum(1, keepdim=True), present.cumsum(1) - 1
    keep = torch.minimum(keep[:, None], count)
    scores = torch.where(place < prefix, torch.finfo(scores.dtype).max, scores)
    scores = torch.where(place >= count - suffix, torch.inf, scores).masked_fill(~present, -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, : int(keep.max())]
    index, rank = order.sort(-1)
    return index, rank < keep


def restore_prompt_tokens(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """x [batch, length, width] with y at the places ``index``, but for those that are padding."""
    y = torch.where(present[..., None], y, take_tokens(x, index))
    return x.scatter(1, index[..., None].expand(-1, -1, x.shape[2]), y)


def cached_places(places: torch.Tensor, past_key_values: Cache | None, layer: int) -> torch.Tensor:
    """``places`` [batch, kept] behind those of past tokens, which the cache has in a ``layer`` of its own."""
    if past_key_values is None:
        return places
    while len(past_key_values.layers) <= layer:
        past_key_values.layers.append(DynamicLayer())
    held = places[:, None, :, None]
    return past_key_values.update(held, held, layer)[0][:, 0, :, 0]


def stage_places(
    places: torch.Tensor, index: torch.Tensor, present: torch.Tensor, past_key_values: Cache | None, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of tokens that go on, -1 for padding: of new ones, and of all that the layers behind have."""
    places = take_tokens(places, index).masked_fill(~present, -1)
    return places, cached_places(places, past_key_values, layer)


def stage_mask(
    places: torch.Tensor, keys: torch.Tensor, past_key_values: Cache | None, layer: int, window: int | None = None
) -> torch.Tensor:
    """What tokens at ``places`` [batch, kept] may look at, bool [batch, 1, kept, keys]: what stands before them.

    Of ``keys`` [batch, all] those count that the cache has in ``layer``.
    """
    kept = places.shape[1]
    held = kept if past_key_values is None else past_key_values.get_mask_sizes(kept, layer)[0]
    keys = keys[:, -held:]
    row, column = places[:, :, None], keys[:, None, :]
    mask = (column >= 0) & (column <= row)
    if window is not None:
        mask = mask & (column > row - window)
    own = torch.arange(held - kept, held, device=places.device)[:, None]
    return (mask | (torch.arange(held, device=places.device) == own))[:, None]


class CompressedLlamaAttention(nn.Module):
    """Attention to the tokens before."""

    def __init__(self, config: CompressedLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[torch.Tensor, ...]:
        q = self.q_proj(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        query = apply_rotary(q, cos, sin)
        k = self.k_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        key = apply_rotary(k, cos, sin)
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return query, key, self.o_proj(attention(query, key, value, attention_mask, self.scaling).flatten(2))


class CompressedLlamaMLP(nn.Module):
    """Feed-forward, for each token by itself."""

    def __init__(self, config: CompressedLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class CompressedLlamaReducingLayer(GradientCheckpointingLayer):
    """One layer of the stack; 1 of them."""

    def __init__(self, config: CompressedLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.scaling = config.head_dim**-0.5
        self.input_layernorm = CompressedLlamaRMSNorm(config.hidden_size, eps=1e-06)
        self.self_attn = CompressedLlamaAttention(config, layer_idx)
        self.post_attention_layernorm = CompressedLlamaRMSNorm(config.hidden_size, eps=1e-06)
        self.mlp = CompressedLlamaMLP(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        lengths: torch.Tensor,
        present: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        query, key, self_attn_output = self.self_attn(
            self.input_layernorm(hidden_states), cos, sin, attention_mask, past_key_values
        )
        whole = hidden_states + self_attn_output
        scores = prompt_scores(query, key, present, self.scaling, rows="last")
        index, present = select_prompt_tokens(
            scores, present, ((7 * lengths + 9) // 10).clamp(min=2), past_key_values, self.layer_idx, prefix=1, suffix=1
        )
        x = take_tokens(whole, index)
        return whole, index, present, x + self.mlp(self.post_attention_layernorm(x))


class CompressedLlamaAttention2(nn.Module):
    """Attention to the tokens before."""

    def __init__(self, config: CompressedLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

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
        query = apply_rotary(query, cos, sin)
        key = apply_rotary(key, cos, sin)
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self.o_proj(attention(query, key, value, attention_mask, self.scaling).flatten(2))


class CompressedLlamaLayer(GradientCheckpointingLayer):
    """One layer of the stack; 2 of them."""

    def __init__(self, config: CompressedLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = CompressedLlamaRMSNorm(config.hidden_size, eps=1e-06)
        self.self_attn = CompressedLlamaAttention2(config, layer_idx)
        self.post_attention_layernorm = CompressedLlamaRMSNorm(config.hidden_size, eps=1e-06)
        self.mlp = CompressedLlamaMLP(config, layer_idx)

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


class CompressedLlamaReducingLayer2(GradientCheckpointingLayer):
    """One layer of the stack; 1 of them."""

    def __init__(self, config: CompressedLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.scaling = config.head_dim**-0.5
        self.input_layernorm = CompressedLlamaRMSNorm(config.hidden_size, eps=1e-06)
        self.self_attn = CompressedLlamaAttention(config, layer_idx)
        self.post_attention_layernorm = CompressedLlamaRMSNorm(config.hidden_size, eps=1e-06)
        self.mlp = CompressedLlamaMLP(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        lengths: torch.Tensor,
        present: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        query, key, self_attn_output = self.self_attn(
            self.input_layernorm(hidden_states), cos, sin, attention_mask, past_key_values
        )
        whole = hidden_states + self_attn_output
        scores = prompt_scores(query, key, present, self.scaling, rows="last")
        index, present = select_prompt_tokens(
            scores, present, ((2 * lengths + 4) // 5).clamp(min=2), past_key_values, self.layer_idx, prefix=1, suffix=1
        )
        x = take_tokens(whole, index)
        return whole, index, present, x + self.mlp(self.post_attention_layernorm(x))


class CompressedLlamaPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: CompressedLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CompressedLlamaLayer", "CompressedLlamaReducingLayer", "CompressedLlamaReducingLayer2"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs = {
        "hidden_states": [CompressedLlamaLayer, CompressedLlamaReducingLayer, CompressedLlamaReducingLayer2]
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CompressedLlamaRotaryEmbedding):
            init.copy_(module.inv_freq, torch.tensor(module.frequencies, dtype=torch.float32))


class CompressedLlamaModel(CompressedLlamaPreTrainedModel):
    """Tokens to hidden states."""

    def __init__(self, config: CompressedLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = CompressedLlamaRotaryEmbedding(config.rope_frequencies)
        self.norm = CompressedLlamaRMSNorm(config.hidden_size, eps=1e-06)
        kinds = {
            "ReducingLayer": CompressedLlamaReducingLayer,
            "Layer": CompressedLlamaLayer,
            "ReducingLayer2": CompressedLlamaReducingLayer2,
        }
        self.layers = nn.ModuleList(kinds[kind](config, layer_idx) for layer_idx, kind in enumerate(config.layer_kinds))
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
        present = present_tokens(hidden_states, attention_mask, past_key_values)
        lengths = present.sum(1)
        mask = causal_mask(hidden_states, attention_mask, past_key_values)
        cos, sin = self.rotary_emb(position_ids)
        whole, index, present, hidden_states = self.layers[0](
            hidden_states, cos, sin, mask, past_key_values, lengths, present
        )
        cos = take_tokens(cos, index)
        sin = take_tokens(sin, index)
        places, keys = stage_places(position_ids, index, present, past_key_values, self.config.num_hidden_layers)
        mask = stage_mask(places, keys, past_key_values, 1)
        for layer in self.layers[1:2]:
            hidden_states = layer(hidden_states, cos, sin, mask, past_key_values)
        whole_2, index_2, present_2, hidden_states = self.layers[2](
            hidden_states, cos, sin, mask, past_key_values, lengths, present
        )
        places, keys = stage_places(places, index_2, present_2, past_key_values, self.config.num_hidden_layers + 1)
        cos = take_tokens(cos, index_2)
        sin = take_tokens(sin, index_2)
        mask = stage_mask(places, keys, past_key_values, 3)
        for layer in self.layers[3:]:
            hidden_states = layer(hidden_states, cos, sin, mask, past_key_values)
        hidden_states = restore_prompt_tokens(whole_2, hidden_states, index_2, present_2)
        last_hidden_state = self.norm(restore_prompt_tokens(whole, hidden_states, index, present))
        return BaseModelOutputWithPast(last_hidden_state=last_hidden_state, past_key_values=past_key_values)


class CompressedLlamaForCausalLM(CompressedLlamaPreTrainedModel, GenerationMixin):
    """The model with a head that scores the next token."""

    _is_stateful = True  # tokens that layers have dropped do not come back: no assistant's tokens can be undone

    def __init__(self, config: CompressedLlamaConfig) -> None:
        super().__init__(config)
        self.model = CompressedLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def _get_static_cache_init_shape(self) -> None:
        """Static caches get their sizes from what is first cached, which differs from the sizes of heads."""

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """As of any model, but for prompts in chunks: which of a prompt's tokens go on depends on all of them."""
        given = options.get("generation_config") or self.generation_config
        if options.get("prefill_chunk_size", given.prefill_chunk_size) is not None:
            raise ValueError("prompts of which layers drop tokens are read in one piece: leave out prefill_chunk_size")
        mixin: Any = super()
        return mixin.generate(*inputs, **options)

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


__all__ = ["CompressedLlamaForCausalLM", "CompressedLlamaModel", "CompressedLlamaPreTrainedModel"]
