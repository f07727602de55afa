"""CompressedT5, generated from the graph of a compressed T5ForConditionalGeneration."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, Seq2SeqLMOutput, Seq2SeqModelOutput

from .configuration_compressed_t5 import CompressedT5Config


class CompressedT5RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def past_length(past_key_values: Cache | None, device: torch.device, layer_idx: int = 0) -> int | torch.Tensor:
    """How many tokens are cached; of static caches a tensor, so that what is compiled does for any number."""
    past = past_key_values.get_seq_length(layer_idx) if past_key_values is not None else 0
    return past.to(device) if isinstance(past, torch.Tensor) else past


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


def _allowed(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mask of scores [batch, heads, length, keys]; without one, each token sees those before it."""
    if mask is not None:
        return mask
    length, keys = scores.shape[2:]
    return torch.ones(length, keys, dtype=torch.bool, device=scores.device).tril(keys - length)


def full_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention to all that is not masked: [batch, heads, length, width] to [batch, length, heads, width]."""
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2)


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """Attention with scores bent at ``softcap``, a bias on them, or ``sinks`` (logits without a value)."""
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.float()
    if causal or mask is not None:
        scores = scores.masked_fill(~_allowed(scores, mask), torch.finfo(torch.float32).min)
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2)


def cross_states(cache: EncoderDecoderCache | None, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values of the encoder's states as they are cached; None where they have still to be made."""
    layers = cache.cross_attention_cache.layers if cache is not None else []
    if layer_idx >= len(layers):
        return None
    key, value = (getattr(layers[layer_idx], name, None) for name in ("keys", "values"))
    return None if key is None or value is None else (key, value)


class CompressedT5EncoderAttention(nn.Module):
    """Attention among tokens."""

    def __init__(self, config: CompressedT5Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads = config.encoder_num_attention_heads
        self.num_key_value_heads = config.encoder_num_key_value_heads
        self.scaling = 1.0
        self.q = nn.Linear(config.hidden_size, config.encoder_num_attention_heads * config.encoder_head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.encoder_num_key_value_heads * config.encoder_head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.encoder_num_key_value_heads * config.encoder_head_dim, bias=False)
        self.o = nn.Linear(config.encoder_num_attention_heads * config.encoder_head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_bias: torch.Tensor,
    ) -> torch.Tensor:
        query = self.q(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        key = self.k(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        value = self.v(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        attended = eager_attention(query, key, value, attention_mask, self.scaling, bias=position_bias, causal=False)
        return self.o(attended.flatten(2))


class CompressedT5EncoderLayer0(nn.Module):
    """A part of the model that only has parts."""

    def __init__(self, config: CompressedT5Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_norm = CompressedT5RMSNorm(config.hidden_size, eps=1e-06)
        self.SelfAttention = CompressedT5EncoderAttention(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_bias: torch.Tensor,
    ) -> torch.Tensor:
        return hidden_states + self.SelfAttention(self.layer_norm(hidden_states), attention_mask, position_bias)


class CompressedT5EncoderDenseReluDense(nn.Module):
    """Feed-forward, for each token by itself."""

    def __init__(self, config: CompressedT5Config, layer_idx: int) -> None:
        super().__init__()
        self.wi = nn.Linear(config.hidden_size, config.encoder_intermediate_size, bias=False)
        self.wo = nn.Linear(config.encoder_intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.wo(F.relu(self.wi(hidden_states)))


class CompressedT5EncoderLayer1(nn.Module):
    """A part of the model that only has parts."""

    def __init__(self, config: CompressedT5Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_norm = CompressedT5RMSNorm(config.hidden_size, eps=1e-06)
        self.DenseReluDense = CompressedT5EncoderDenseReluDense(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.DenseReluDense(self.layer_norm(hidden_states))


class CompressedT5EncoderLayer(GradientCheckpointingLayer):
    """One layer of the stack; 15 of them."""

    def __init__(self, config: CompressedT5Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_0 = CompressedT5EncoderLayer0(config, layer_idx)
        self.layer_1 = CompressedT5EncoderLayer1(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_bias: torch.Tensor,
    ) -> torch.Tensor:
        return self.layer_1(self.layer_0(hidden_states, attention_mask, position_bias))


class CompressedT5DecoderAttention(nn.Module):
    """Attention to the tokens before."""

    def __init__(self, config: CompressedT5Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads = config.decoder_num_attention_heads
        self.num_key_value_heads = config.decoder_num_key_value_heads
        self.scaling = 1.0
        self.q = nn.Linear(config.hidden_size, config.decoder_num_attention_heads * config.decoder_head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.decoder_num_key_value_heads * config.decoder_head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.decoder_num_key_value_heads * config.decoder_head_dim, bias=False)
        self.o = nn.Linear(config.decoder_num_attention_heads * config.decoder_head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
        position_bias: torch.Tensor,
    ) -> torch.Tensor:
        query = self.q(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        key = self.k(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        value = self.v(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.self_attention_cache.update(key, value, self.layer_idx)
        hidden_states = eager_attention(query, key, value, attention_mask, self.scaling, bias=position_bias).flatten(2)
        return self.o(hidden_states)


class CompressedT5DecoderLayer0(nn.Module):
    """A part of the model that only has parts."""

    def __init__(self, config: CompressedT5Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_norm = CompressedT5RMSNorm(config.hidden_size, eps=1e-06)
        self.SelfAttention = CompressedT5DecoderAttention(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
        position_bias: torch.Tensor,
    ) -> torch.Tensor:
        SelfAttention_output = self.SelfAttention(
            self.layer_norm(hidden_states), attention_mask, past_key_values, position_bias
        )
        return hidden_states + SelfAttention_output


class CompressedT5DecoderCrossAttention(nn.Module):
    """Attention to what the encoder makes, whose keys and values are made once."""

    def __init__(self, config: CompressedT5Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads = config.decoder_num_attention_heads
        self.num_key_value_heads = config.decoder_num_key_value_heads
        self.scaling = 1.0
        self.q = nn.Linear(config.hidden_size, config.decoder_num_attention_heads * config.decoder_head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.decoder_num_key_value_heads * config.decoder_head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.decoder_num_key_value_heads * config.decoder_head_dim, bias=False)
        self.o = nn.Linear(config.decoder_num_attention_heads * config.decoder_head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
    ) -> torch.Tensor:
        query = self.q(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        states = cross_states(past_key_values, self.layer_idx)
        if states is None:
            key = self.k(encoder_hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
            value = self.v(encoder_hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
            if past_key_values is not None:
                past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
        else:
            key, value = states
        return self.o(full_attention(query, key, value, encoder_attention_mask, self.scaling).flatten(2))


class CompressedT5DecoderLayer1(nn.Module):
    """A part of the model that only has parts."""

    def __init__(self, config: CompressedT5Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_norm = CompressedT5RMSNorm(config.hidden_size, eps=1e-06)
        self.EncDecAttention = CompressedT5DecoderCrossAttention(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
    ) -> torch.Tensor:
        normed = self.layer_norm(hidden_states)
        EncDecAttention_output = self.EncDecAttention(
            normed, encoder_hidden_states, encoder_attention_mask, past_key_values
        )
        return hidden_states + EncDecAttention_output


class CompressedT5DecoderDenseReluDense(nn.Module):
    """Feed-forward, for each token by itself."""

    def __init__(self, config: CompressedT5Config, layer_idx: int) -> None:
        super().__init__()
        self.wi = nn.Linear(config.hidden_size, config.decoder_intermediate_size, bias=False)
        self.wo = nn.Linear(config.decoder_intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.wo(F.relu(self.wi(hidden_states)))


class CompressedT5DecoderLayer2(nn.Module):
    """A part of the model that only has parts."""

    def __init__(self, config: CompressedT5Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_norm = CompressedT5RMSNorm(config.hidden_size, eps=1e-06)
        self.DenseReluDense = CompressedT5DecoderDenseReluDense(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.DenseReluDense(self.layer_norm(hidden_states))


class CompressedT5DecoderLayer(GradientCheckpointingLayer):
    """One layer of the stack; 15 of them."""

    def __init__(self, config: CompressedT5Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_0 = CompressedT5DecoderLayer0(config, layer_idx)
        self.layer_1 = CompressedT5DecoderLayer1(config, layer_idx)
        self.layer_2 = CompressedT5DecoderLayer2(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
        position_bias: torch.Tensor,
    ) -> torch.Tensor:
        hidden_states = self.layer_0(hidden_states, attention_mask, past_key_values, position_bias)
        hidden_states = self.layer_1(hidden_states, encoder_hidden_states, encoder_attention_mask, past_key_values)
        return self.layer_2(hidden_states)


class CompressedT5PreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: CompressedT5Config
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CompressedT5DecoderLayer", "CompressedT5EncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True


class CompressedT5Encoder(CompressedT5PreTrainedModel):
    """Tokens to states that the decoder attends to."""

    def __init__(self, config: CompressedT5Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.relative_attention_bias = nn.Embedding(8, 4)
        self.final_layer_norm = CompressedT5RMSNorm(config.hidden_size, eps=1e-06)
        self.block = nn.ModuleList(
            CompressedT5EncoderLayer(config, layer_idx) for layer_idx in range(config.encoder_num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """Args: ``attention_mask`` [batch, length] is 0 where a token is padding."""
        mask = padding_mask(input_ids, attention_mask)
        x = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = x.unsqueeze(0) - x.unsqueeze(1)
        x_2 = x.abs()
        x_3 = (((x_2.to(torch.float32) / 2.0).log() / 1.791759469228055 * 2.0).to(torch.int64) + 2).clamp(max=3)
        embeddings = self.relative_attention_bias((x > 0).to(torch.int64) * 4 + torch.where(x_2 < 2, x_2, x_3))
        hidden_states = self.embed_tokens(input_ids)
        position_bias = embeddings.permute(2, 0, 1).unsqueeze(0)
        for layer in self.block:
            hidden_states = layer(hidden_states, mask, position_bias)
        return BaseModelOutput(last_hidden_state=self.final_layer_norm(hidden_states))


class CompressedT5Decoder(CompressedT5PreTrainedModel):
    """Tokens and the encoder's states to hidden states."""

    def __init__(self, config: CompressedT5Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.relative_attention_bias = nn.Embedding(8, 4)
        self.final_layer_norm = CompressedT5RMSNorm(config.hidden_size, eps=1e-06)
        self.block = nn.ModuleList(
            CompressedT5DecoderLayer(config, layer_idx) for layer_idx in range(config.decoder_num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Args: masks [batch, past + length] and [batch, encoder length] are 0 where a token is padding."""
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        mask = causal_mask(input_ids, attention_mask, past_key_values)
        past = past_length(past_key_values, input_ids.device)
        keys = length = input_ids.shape[1]
        if past_key_values is not None:
            keys, _ = past_key_values.get_mask_sizes(length, 0)
        key_positions = torch.arange(keys, device=input_ids.device)
        query_positions = torch.arange(length, device=input_ids.device) + past
        encoder_mask = None
        if encoder_attention_mask is not None:
            encoder_mask = encoder_attention_mask[:, None, None, :].bool()
        x = -(key_positions.unsqueeze(0) - query_positions.unsqueeze(1)).clamp(max=0)
        x_2 = (((x.to(torch.float32) / 4.0).log() / 1.0986122886681098 * 4.0).to(torch.int64) + 4).clamp(max=7)
        hidden_states = self.embed_tokens(input_ids)
        position_bias = self.relative_attention_bias(torch.where(x < 4, x, x_2)).permute(2, 0, 1).unsqueeze(0)
        for layer in self.block:
            hidden_states = layer(
                hidden_states, encoder_hidden_states, mask, encoder_mask, past_key_values, position_bias
            )
        last_hidden_state = self.final_layer_norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=last_hidden_state, past_key_values=past_key_values)


class CompressedT5Model(CompressedT5PreTrainedModel):
    """Encoder and decoder."""

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: CompressedT5Config) -> None:
        super().__init__(config)
        self.encoder = CompressedT5Encoder(config)
        self.decoder = CompressedT5Decoder(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """Args: ``attention_mask`` [batch, length] is 0 where a token of the encoder is padding."""
        encoded = encoder_outputs
        if encoded is None:
            encoded = self.encoder(input_ids, attention_mask=attention_mask)
        outputs = self.decoder(
            decoder_input_ids,
            encoded[0],
            attention_mask=decoder_attention_mask,
            encoder_attention_mask=attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            encoder_last_hidden_state=encoded[0],
        )


class CompressedT5ForConditionalGeneration(CompressedT5PreTrainedModel, GenerationMixin):
    """The model with a head that scores the decoder's next token."""

    _tied_weights_keys = {
        "model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
        "lm_head.weight": "model.encoder.embed_tokens.weight",
    }

    def __init__(self, config: CompressedT5Config) -> None:
        super().__init__(config)
        self.model = CompressedT5Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None, **given: Any) -> torch.Tensor | None:
        """The mask of a static cache, whose size is the same for every token."""
        return causal_mask(given["inputs_embeds"], attention_mask, given["past_key_values"])

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Args: ``labels`` [batch, length] are token ids, -100 where there is no loss; they are the decoder's input
        too, one place later, where ``decoder_input_ids`` is not given."""
        if decoder_input_ids is None and labels is not None:
            start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
            before = labels[:, :-1].masked_fill(labels[:, :-1] == -100, self.config.pad_token_id)
            decoder_input_ids = torch.cat((start, before), dim=-1)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states * 0.14433756729740643)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
        )


__all__ = ["CompressedT5ForConditionalGeneration", "CompressedT5Model", "CompressedT5PreTrainedModel"]
