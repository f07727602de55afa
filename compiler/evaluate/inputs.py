"""What a model is fed when it is measured: token windows of a text, or random inputs of the kind it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiler.errors import DataError, first_line, out_of_memory
from compiler.evaluate.texts import TextData
from compiler.frontend.sizes import feature_shape, image_shape, input_names


@dataclass(frozen=True)
class Window:
    """One forward call: its arguments, and for texts the token ids [length] and the bytes they stand for."""

    arguments: Mapping[str, Tensor]
    ids: Tensor | None = None
    text_bytes: int = 0

    def cast(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The arguments, those of floats in ``dtype``."""
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.arguments.items()}


def forward(model: Any, arguments: Mapping[str, Tensor]) -> Any:
    """What ``model`` gives for ``arguments``. Raises DataError for pictures of a size that it does not take."""
    try:
        with torch.inference_mode():
            return model(**arguments)
    except (ValueError, RuntimeError) as reason:  # each class refuses a size in its own way
        pixels = arguments.get("pixel_values")
        if pixels is None or out_of_memory(reason):
            raise
        size = " x ".join(map(str, pixels.shape[-2:]))
        cause = f"a {type(model).__name__} takes no pictures of {size} pixels: {first_line(reason)}"
        raise DataError(cause, remedy="name the size that it takes by `image`, or none") from reason


def is_causal(model: Any) -> bool:
    """Whether a loaded model continues token sequences."""
    return model.main_input_name == "input_ids" and model.can_generate() and not model.config.is_encoder_decoder


def is_paired(model: Any) -> bool:
    """Whether a loaded model is an encoder and a decoder that writes tokens."""
    return bool(model.config.is_encoder_decoder and model.can_generate())


def text_windows(model: Any, tokenizer: Any, text: TextData) -> list[Window]:
    """The windows of ``text`` as calls. Raises DataError when they are longer than the model takes."""
    _check_length(model, text.length)
    source = torch.Generator().manual_seed(text.seed)
    return [
        Window(_token_arguments(model, ids, source), ids, len(tokenizer.decode(ids[1:]).encode()))
        for ids in text.windows(tokenizer)
    ]


def random_windows(model: Any, samples: int, length: int, seed: int, image: int | None = None) -> list[Window]:
    """``samples`` calls with random tokens (``length`` of them), standard normal pixels or audio features.

    Pictures are ``image`` pixels high and wide, by default as the config says.
    """
    source = torch.Generator().manual_seed(seed)
    return [Window(_random_arguments(model, length, source, image)) for _ in range(samples)]


def random_ids(model: Any, length: int, source: torch.Generator) -> Tensor:
    """Token ids, int64 [length]."""
    return torch.randint(model.config.get_text_config().vocab_size, (length,), generator=source)


def position_limit(model: Any) -> int | None:
    """The longest sequence of tokens that a loaded model takes; None where it does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)


def _check_length(model: Any, length: int) -> None:
    limit = position_limit(model)
    if limit and length > limit:
        raise DataError(
            f"windows of {length} tokens are longer than the {limit} that the model takes",
            remedy=f"`length` can be {limit} at most",
            option="length",
        )


def _random_arguments(model: Any, length: int, source: torch.Generator, image: int | None) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": _random_image(model.config, source, image)}
    _check_length(model, length)
    ids = random_ids(model, length, source)
    if model.main_input_name == "input_features":
        features = torch.randn(1, *feature_shape(model.config), generator=source)
        return {"input_features": features, "decoder_input_ids": ids[None]}
    return _token_arguments(model, ids, source)


def _token_arguments(model: Any, ids: Tensor, source: torch.Generator) -> dict[str, Tensor]:
    arguments = {"input_ids": ids[None]}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = ids[None]
    if "pixel_values" in input_names(model):
        arguments["pixel_values"] = _random_image(model.config, source)
    return arguments


def _random_image(config: Any, source: torch.Generator, image: int | None = None) -> Tensor:
    channels, height, width = image_shape(config)
    return torch.randn(1, channels, image or height, image or width, generator=source)
