"""What the methods share: the parts of a decoder of the llama kind, removal of them, and the count of what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoders import feed, linear_numbers


def layers_of(model: Any) -> nn.ModuleList:
    return model.base_model.layers


def held(model: Any) -> int:
    """Numbers that ``model`` holds, tied ones once, without zeros of vectors, rows and columns of zeros of matrices."""
    tensors = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    return sum(_size(tensor.detach()) for tensor in tensors.values())


def _size(tensor: Tensor) -> int:
    if tensor.dim() != 2:
        return int(tensor.count_nonzero()) if tensor.dim() == 1 else tensor.numel()
    return int(tensor.any(1).sum()) * int(tensor.any(0).sum())


def counted(change: Callable[..., None]) -> Callable[..., int]:
    """``change``, which also returns how many numbers fewer the model holds after it."""

    def apply(model: Any, *rest: Any, **setting: Any) -> int:
        before = held(model)
        with torch.no_grad():
            change(model, *rest, **setting)
        return before - held(model)

    return apply


def remove_channels(mlp: Any, gone: Tensor) -> None:
    mlp.gate_proj.weight[gone] = 0
    mlp.up_proj.weight[gone] = 0
    mlp.down_proj.weight[:, gone] = 0


def cut_channels(model: Any, scores: Sequence[Tensor], keep: float) -> None:
    """Take the channels with the least ``scores`` out of every MLP, as many of each, until ``keep`` remains."""
    mlps = [layer.mlp for layer in layers_of(model)]
    channel = sum(3 * mlp.down_proj.out_features for mlp in mlps)
    count = math.ceil((1 - keep) * linear_numbers(model) / channel - 1e-9)
    for mlp, score in zip(mlps, scores, strict=True):
        remove_channels(mlp, score.argsort()[:count])


def influences(model: Any, windows: Tensor) -> list[float]:
    """Of every layer 1 - E cos(what enters, what leaves), over all tokens of ``windows``."""
    total = torch.zeros(len(layers_of(model)), dtype=torch.float64)

    def see(index: int) -> Any:
        def hook(_: Any, args: Any, out: Tensor) -> None:
            total[index] += nn.functional.cosine_similarity(args[0].double(), out.double(), dim=-1).sum()

        return hook

    hooks = [layer.register_forward_hook(see(index)) for index, layer in enumerate(layers_of(model))]
    with torch.no_grad():
        feed(model, windows)()
    for each in hooks:
        each.remove()
    return (1 - total / windows.numel()).tolist()
