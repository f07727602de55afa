"""Example inputs to trace a module with, on the meta device: only their shapes and dtypes matter."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compiler.errors import CaptureError
from compiler.frontend.sizes import feature_shape, image_shape, input_names

_BATCH, _TOKENS, _DECODER_TOKENS = 2, 8, 6


def default_inputs(module: nn.Module, image: int | None) -> dict[str, Tensor]:
    """Inputs of a transformers model on the meta device; pictures are ``image`` pixels high and wide, by default as its
    config says. Raises CaptureError where it is not known what the model takes, or takes no pictures.
    """
    main = getattr(module, "main_input_name", None)
    config = getattr(module, "config", None)
    if not isinstance(main, str) or config is None:
        raise CaptureError("a module that is no transformers model needs example inputs", remedy="pass inputs=")
    inputs = {name: _example(name, config, image) for name in input_names(module)}
    if image is not None and "pixel_values" not in inputs:
        raise CaptureError(f"a {type(module).__name__} takes no pictures", remedy="leave out the size of pictures")
    takes_decoder_ids = "decoder_input_ids" in inspect.signature(module.forward).parameters
    if takes_decoder_ids and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _tokens(_DECODER_TOKENS)
    return inputs


def _example(name: str, config: Any, image: int | None) -> Tensor:
    if name == "input_ids":
        return _tokens(_TOKENS)
    if name == "pixel_values":
        channels, height, width = image_shape(config)
        return torch.zeros(_BATCH, channels, image or height, image or width, device="meta")
    if name == "input_features":
        return torch.zeros(_BATCH, *feature_shape(config), device="meta")
    raise CaptureError(f"no example of the input `{name}` is known", remedy="pass inputs=")


def _tokens(length: int) -> Tensor:
    return torch.zeros(_BATCH, length, dtype=torch.int64, device="meta")


def shaped_like(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of these shapes on the meta device; sizes of 1 on dynamic axes grow, since tracing would fix them."""
    examples, of_each = dict[str, Tensor](), _rows_of_each(inputs)
    for name, tensor in inputs.items():
        shape = list(tensor.shape)
        for axis in _dynamic_axes(tensor):
            shape[axis] = max(shape[axis], 2 if axis else 2 * of_each[name])
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        examples[name] = torch.zeros(shape, dtype=dtype, device="meta")
    return examples


def _dynamic_axes(tensor: Tensor) -> list[int]:
    """The batch axis, and the token axis of ids [B, T] and of embeddings [B, T, D]."""
    tokens = tensor.dim() == 3 or (tensor.dim() == 2 and not tensor.is_floating_point())
    return [0, 1] if tokens else [0][: tensor.dim()]


def dims_of(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Names of the axes that stay symbolic: B, such as 5*B of pictures of which each text has so many, and T, or S for
    the encoder beside a decoder."""
    has_decoder, of_each = any(name.startswith("decoder_") for name in inputs), _rows_of_each(inputs)
    return {
        name: {
            axis: (
                "B" if of_each[name] == 1 else f"{of_each[name]}*B",
                "S" if has_decoder and not name.startswith("decoder_") else "T",
            )[axis]
            for axis in _dynamic_axes(tensor)
        }
        for name, tensor in inputs.items()
    }


def _rows_of_each(inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """How many rows of each input go with one of the first: 1 where that is no whole number."""
    batch = next((len(tensor) for tensor in inputs.values() if tensor.dim()), 1)
    sizes = {name: len(tensor) if tensor.dim() else batch for name, tensor in inputs.items()}
    return {name: 1 if not batch or size % batch else size // batch or 1 for name, size in sizes.items()}
