"""Published ways to quantise decoder weights, reimplemented as published to be measured beside ours.

All linear maps of the decoder layers, in groups of 64 inputs of a row. Integers are symmetric unless said otherwise.

`nearest`: the least scale that clips nothing. `gptq` (arXiv 2210.17323), as llm-compressor runs it by default: layers
in order, on what the quantised layers before pass on; scales that clip nothing, of the weights as they were; columns by
falling energy of their inputs, blocks of 128, damping of 0.01 of the mean. `gptq-clipped` chooses each scale among 20
that clip up to 80 % (the search of many packages) by squared error. `hqq` (half-quadratic quantisation, Badri and Shaji
2023): no data, real zero points, 20 steps against |error|^0.7; scales and zero points of 16 bits each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoders import Peer, Row, linear_numbers, watch
from benchmarks.peers_sparsify import add, entering, through

BLOCK, DAMPING, GROUP = 128, 0.01, 64
FLOAT = 32  # bits of the checkpoint's own numbers, and of scales
SHRINKAGES = [1 - 0.04 * step for step in range(20)]
STEPS, POWER, STIFFNESS, STIFFENING = 20, 0.7, 10.0, 1.01

Scales = Callable[[Tensor, int], Tensor]
"""From groups [rows, groups, 64] and bits to scales [rows, groups]."""


def settings(bits: float, model: Any) -> list[Row]:
    return [{"bits": int(bits)}]


def saved(model: Any, bits: float) -> int:
    """Numbers of 32 bits that ``bits`` a weight save."""
    return round(linear_numbers(model) * (1 - bits / FLOAT))


def linears_of(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def unclipped(groups: Tensor, bits: int) -> Tensor:
    return groups.abs().amax(-1).clamp_min(1e-8) / ((2**bits - 1) / 2)


def clipped(groups: Tensor, bits: int) -> Tensor:
    scales = [unclipped(groups, bits) * factor for factor in SHRINKAGES]
    errors = torch.stack([(rounded(groups, each[..., None], bits) - groups).square().sum(-1) for each in scales])
    return torch.stack(scales).gather(0, errors.argmin(0, keepdim=True))[0]


def rounded(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def nearest(model: Any, windows: Tensor, bits: int) -> int:
    for layer in model.base_model.layers:
        for one in linears_of(layer):
            groups = one.weight.data.unflatten(1, (-1, GROUP))
            one.weight.data = rounded(groups, unclipped(groups, bits)[..., None], bits).flatten(1)
    return saved(model, bits + FLOAT / GROUP)


def gptq(model: Any, windows: Tensor, bits: int, scales: Scales) -> int:
    states, given = entering(model, windows)
    for layer in model.base_model.layers:
        sums = {one: torch.zeros(one.in_features, one.in_features, dtype=torch.float64) for one in linears_of(layer)}
        forward = partial(through, layer, states, given)
        watch(forward, {one: partial(add, total) for one, total in sums.items()})
        for one, total in sums.items():
            one.weight.data = solved(one.weight.data, total.float(), bits, scales)
        states = forward()
    return saved(model, bits + FLOAT / GROUP)


def solved(weight: Tensor, hessian: Tensor, bits: int, scales: Scales) -> Tensor:
    scale = scales(weight.unflatten(1, (-1, GROUP)), bits).repeat_interleave(GROUP, 1)
    order = hessian.diagonal().argsort(descending=True)
    weight, scale, hessian = weight[:, order], scale[:, order], hessian[order][:, order]
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        block, own = weight[:, start:stop], factor[start:stop, start:stop]
        errors = torch.zeros_like(block)
        for i in range(stop - start):
            value = rounded(block[:, i], scale[:, start + i], bits)
            errors[:, i] = (block[:, i] - value) / own[i, i]
            block[:, i:] -= torch.outer(errors[:, i], own[i, i:])
            block[:, i] = value
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight[:, order.argsort()]


def hqq(model: Any, windows: Tensor, bits: int) -> int:
    for layer in model.base_model.layers:
        for one in linears_of(layer):
            one.weight.data = half_quadratic(one.weight.data.unflatten(1, (-1, GROUP)), bits).flatten(1)
    return saved(model, bits + 2 * 16 / GROUP)


def half_quadratic(groups: Tensor, bits: int) -> Tensor:
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (2**bits - 1) / (high - low).clamp_min(1e-8)
    zero, stiffness = -low * scale, STIFFNESS
    best, least = groups, float("inf")
    for _ in range(STEPS):
        codes = (groups * scale + zero).round().clamp(0, 2**bits - 1)
        values = (codes - zero) / scale
        error = float((groups - values).abs().mean())
        if error >= least:
            break
        best, least = values, error
        off = groups - values
        off = off.sign() * (off.abs() - off.abs().clamp_min(1e-8).pow(POWER - 1) / stiffness).relu()
        zero = (codes - (groups - off) * scale).mean(-1, keepdim=True)
        stiffness *= STIFFENING
    return best


METHODS = {
    "nearest": nearest,
    "gptq": partial(gptq, scales=unclipped),
    "gptq-clipped": partial(gptq, scales=clipped),
    "hqq": hqq,
}
PEERS = {name: Peer(lambda model, windows: windows, apply, settings) for name, apply in METHODS.items()}
