"""CompressedWhisper, generated from the graph of a compressed WhisperForConditionalGeneration."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, Seq2SeqLMOutput, Seq2SeqModelOutput

from .configuration_compressed_whisper import CompressedWhisperConfig
from .latent_decode import latent_decode


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


def full_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention to all that is not masked: [batch, heads, length, width] to [batch, length, heads, width]."""
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
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


def cross_states(cache: EncoderDecoderCache | None, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values of the encoder's states as they are cached; None where they have still to be made."""
    layers = cache.cross_attention_cache.layers if cache is not None else []
    if layer_idx >= len(layers):
        return None
    key, value = (getattr(layers[layer_idx], name, None) for name in ("keys", "values"))
    return None if key is None or value is None else (key, value)


def update_latents(
    cache: Cache, latent: torch.Tensor, rotary_key: torch.Tensor, layer_idx: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All latents and rotary keys [batch, keys, size] with these as the last; the cache has them as one head's."""
    held = cache.update(latent.unsqueeze(1), rotary_key.unsqueeze(1), layer_idx)
    return held[0].squeeze(1), held[1].squeeze(1)


class CompressedWhisperEncoderAttention(nn.Module):
    """Attention among tokens."""

    def __init__(self, config: CompressedWhisperConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads = config.encoder_num_attention_heads
        self.num_key_value_heads = config.encoder_num_key_value_heads
        self.scaling = config.encoder_head_dim**-0.5
        self.q_proj = nn.Linear(
            config.hidden_size,
            config.encoder_num_attention_heads * config.encoder_head_dim,
            bias=True,
        )
        self.k_proj = nn.Linear(
            config.hidden_size,
            config.encoder_num_key_value_heads * config.encoder_head_dim,
            bias=False,
        )
        self.v_proj = nn.Linear(
            config.hidden_size,
            config.encoder_num_key_value_heads * config.encoder_head_dim,
            bias=True,
        )
        self.out_proj = nn.Linear(
            config.encoder_num_attention_heads * config.encoder_head_dim,
            config.hidden_size,
            bias=True,
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.q_proj(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        key = self.k_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        return self.out_proj(full_attention(query, key, value, None, self.scaling).flatten(2))


class CompressedWhisperEncoderLayer(GradientCheckpointingLayer):
    """One layer of the stack; 15 of them."""

    def __init__(self, config: CompressedWhisperConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-05)
        self.self_attn = CompressedWhisperEncoderAttention(config, layer_idx)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-05)
        self.fc1 = nn.Linear(config.hidden_size, config.encoder_intermediate_size, bias=True)
        self.fc2 = nn.Linear(config.encoder_intermediate_size, config.hidden_size, bias=True)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.self_attn_layer_norm(hidden_states))
        return hidden_states + self.fc2(F.gelu(self.fc1(self.final_layer_norm(hidden_states))))


class CompressedWhisperDecoderEmbedPositions(nn.Module):
    """From tokens or places in the input to vectors."""

    def __init__(self, config: CompressedWhisperConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.max_target_positions, config.hidden_size))

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return self.weight[position_ids]


class CompressedWhisperLatentDecoderAttention(nn.Module):
    """Attention to keys and values that are made from one latent for each token, which is cached."""

    def __init__(self, config: CompressedWhisperConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads = config.decoder_num_attention_heads
        self.scaling = (config.decoder_qk_nope_head_dim + config.decoder_qk_rope_head_dim) ** -0.5
        self.kv_down = nn.Linear(
            config.hidden_size,
            config.decoder_kv_lora_rank[layer_idx] + config.decoder_qk_rope_head_dim,
            bias=False,
        )
        self.query = nn.Linear(
            config.hidden_size,
            config.decoder_num_attention_heads * (config.decoder_qk_nope_head_dim + config.decoder_qk_rope_head_dim),
            bias=False,
        )
        self.kv_up = nn.Linear(
            config.decoder_kv_lora_rank[layer_idx],
            config.decoder_num_attention_heads * (config.decoder_qk_nope_head_dim + config.decoder_v_head_dim),
            bias=False,
        )
        self.out_proj = nn.Linear(
            config.decoder_num_attention_heads * config.decoder_head_dim,
            config.hidden_size,
            bias=True,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
    ) -> torch.Tensor:
        query = self.query(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        latent = self.kv_down(hidden_states)
        if past_key_values is not None:
            latent, _ = update_latents(past_key_values.self_attention_cache, latent, latent[..., :0], self.layer_idx)
        hidden_states = latent_attention(query, latent, None, self.kv_up.weight, attention_mask, self.scaling).flatten(
            2
        )
        return self.out_proj(hidden_states)


class CompressedWhisperDecoderCrossAttention(nn.Module):
    """Attention to what the encoder makes, whose keys and values are made once."""

    def __init__(self, config: CompressedWhisperConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads = config.decoder_num_attention_heads
        self.num_key_value_heads = config.decoder_num_key_value_heads
        self.scaling = config.decoder_head_dim**-0.5
        self.q_proj = nn.Linear(
            config.hidden_size,
            config.decoder_num_attention_heads * config.decoder_head_dim,
            bias=True,
        )
        self.k_proj = nn.Linear(
            config.hidden_size,
            config.decoder_num_key_value_heads * config.decoder_head_dim,
            bias=False,
        )
        self.v_proj = nn.Linear(
            config.hidden_size,
            config.decoder_num_key_value_heads * config.decoder_head_dim,
            bias=True,
        )
        self.out_proj = nn.Linear(
            config.decoder_num_attention_heads * config.decoder_head_dim,
            config.hidden_size,
            bias=True,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        past_key_values: EncoderDecoderCache | None,
    ) -> torch.Tensor:
        query = self.q_proj(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        states = cross_states(past_key_values, self.layer_idx)
        if states is None:
            key = self.k_proj(encoder_hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
            value = self.v_proj(encoder_hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
            if past_key_values is not None:
                past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
        else:
            key, value = states
        return self.out_proj(full_attention(query, key, value, None, self.scaling).flatten(2))


class CompressedWhisperLatentDecoderLayer(GradientCheckpointingLayer):
    """One layer of the stack; 10 of them."""

    def __init__(self, config: CompressedWhisperConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-05)
        self.self_attn = CompressedWhisperLatentDecoderAttention(config, layer_idx)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-05)
        self.encoder_attn = CompressedWhisperDecoderCrossAttention(config, layer_idx)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-05)
        self.fc1 = nn.Linear(config.hidden_size, config.decoder_intermediate_size, bias=True)
        self.fc2 = nn.Linear(config.decoder_intermediate_size, config.hidden_size, bias=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
    ) -> torch.Tensor:
        self_attn_output = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_mask, past_key_values)
        hidden_states = hidden_states + self_attn_output
        normed = self.encoder_attn_layer_norm(hidden_states)
        hidden_states = hidden_states + self.encoder_attn(normed, encoder_hidden_states, past_key_values)
        return hidden_states + self.fc2(F.gelu(self.fc1(self.final_layer_norm(hidden_states))))


class CompressedWhisperDecoderAttention(nn.Module):
    """Attention to the tokens before."""

    def __init__(self, config: CompressedWhisperConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads = config.decoder_num_attention_heads
        self.num_key_value_heads = config.decoder_num_key_value_heads
        self.scaling = config.decoder_head_dim**-0.5
        self.q_proj = nn.Linear(
            config.hidden_size,
            config.decoder_num_attention_heads * config.decoder_head_dim,
            bias=True,
        )
        self.k_proj = nn.Linear(
            config.hidden_size,
            config.decoder_num_key_value_heads * config.decoder_head_dim,
            bias=False,
        )
        self.v_proj = nn.Linear(
            config.hidden_size,
            config.decoder_num_key_value_heads * config.decoder_head_dim,
            bias=True,
        )
        self.out_proj = nn.Linear(
            config.decoder_num_attention_heads * config.decoder_head_dim,
            config.hidden_size,
            bias=True,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
    ) -> torch.Tensor:
        query = self.q_proj(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        key = self.k_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.self_attention_cache.update(key, value, self.layer_idx)
        return self.out_proj(attention(query, key, value, attention_mask, self.scaling).flatten(2))


class CompressedWhisperDecoderLayer(GradientCheckpointingLayer):
    """One layer of the stack; 5 of them."""

    def __init__(self, config: CompressedWhisperConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-05)
        self.self_attn = CompressedWhisperDecoderAttention(config, layer_idx)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-05)
        self.encoder_attn = CompressedWhisperDecoderCrossAttention(config, layer_idx)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-05)
        self.fc1 = nn.Linear(config.hidden_size, config.decoder_intermediate_size, bias=True)
        self.fc2 = nn.Linear(config.decoder_intermediate_size, config.hidden_size, bias=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
    ) -> torch.Tensor:
        self_attn_output = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_mask, past_key_values)
        hidden_states = hidden_states + self_attn_output
        normed = self.encoder_attn_layer_norm(hidden_states)
        hidden_states = hidden_states + self.encoder_attn(normed, encoder_hidden_states, past_key_values)
        return hidden_states + self.fc2(F.gelu(self.fc1(self.final_layer_norm(hidden_states))))


class CompressedWhisperPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: CompressedWhisperConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "CompressedWhisperDecoderLayer",
        "CompressedWhisperEncoderLayer",
        "CompressedWhisperLatentDecoderLayer",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CompressedWhisperDecoderEmbedPositions):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class CompressedWhisperEncoder(CompressedWhisperPreTrainedModel):
    """Features to states that the decoder attends to."""

    def __init__(self, config: CompressedWhisperConfig) -> None:
        super().__init__(config)
        self.max_source_positions = config.max_source_positions
        self.conv1 = nn.Conv1d(8, 48, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(48, 48, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-05)
        self.layers = nn.ModuleList(
            CompressedWhisperEncoderLayer(config, layer_idx) for layer_idx in range(config.encoder_num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_features: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        embeddings = self.embed_positions(torch.arange(self.max_source_positions, device=input_features.device))
        hidden_states = F.gelu(self.conv2(F.gelu(self.conv1(input_features)))).transpose(1, 2) + embeddings
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))


class CompressedWhisperDecoder(CompressedWhisperPreTrainedModel):
    """Tokens and the encoder's states to hidden states."""

    def __init__(self, config: CompressedWhisperConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = CompressedWhisperDecoderEmbedPositions(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-05)
        kinds = {
            "LatentDecoderLayer": CompressedWhisperLatentDecoderLayer,
            "DecoderLayer": CompressedWhisperDecoderLayer,
        }
        self.layers = nn.ModuleList(
            kinds[kind](config, layer_idx) for layer_idx, kind in enumerate(config.decoder_layer_kinds)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Args: masks [batch, past + length] and [batch, encoder length] are 0 where a token is padding."""
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        mask = causal_mask(input_ids, attention_mask, past_key_values)
        if position_ids is None:
            position_ids = token_positions(input_ids, attention_mask, past_key_values)
        hidden_states = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, encoder_hidden_states, mask, past_key_values)
        last_hidden_state = self.layer_norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=last_hidden_state, past_key_values=past_key_values)


class CompressedWhisperModel(CompressedWhisperPreTrainedModel):
    """Encoder and decoder."""

    def __init__(self, config: CompressedWhisperConfig) -> None:
        super().__init__(config)
        self.encoder = CompressedWhisperEncoder(config)
        self.decoder = CompressedWhisperDecoder(config)
        self.post_init()

    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """Args: ``attention_mask`` is not used: all of the features are heard."""
        encoded = encoder_outputs
        if encoded is None:
            encoded = self.encoder(input_features)
        outputs = self.decoder(
            decoder_input_ids,
            encoded[0],
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            encoder_last_hidden_state=encoded[0],
        )


class CompressedWhisperForConditionalGeneration(CompressedWhisperPreTrainedModel, GenerationMixin):
    """The model with a head that scores the decoder's next token."""

    _tied_weights_keys = {"proj_out.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: CompressedWhisperConfig) -> None:
        super().__init__(config)
        self.model = CompressedWhisperModel(config)
        self.proj_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.proj_out

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.proj_out = new_embeddings

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None, **given: Any) -> torch.Tensor | None:
        """The mask of a static cache, whose size is the same for every token."""
        return causal_mask(given["inputs_embeds"], attention_mask, given["past_key_values"])

    def forward(
        self,
        input_features: torch.Tensor | None = None,
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
            input_features,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.proj_out(hidden_states)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
        )


__all__ = ["CompressedWhisperForConditionalGeneration", "CompressedWhisperModel", "CompressedWhisperPreTrainedModel"]
