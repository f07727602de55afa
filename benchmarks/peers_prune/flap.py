"""FLAP (arXiv 2312.11983): fluctuation of inputs, one threshold for attention and MLPs, means kept in new biases.

Inputs of output and down projections are scored by Var(x_i) Σ_o W_oi² (WIFV), standardised within each layer; scores
of heads are means over their inputs; one threshold cuts all of them (AL-AM), a head weighing as much as its
numbers do in channels. What goes is made up for in the mean: b_o = Σ W_oi E[x_i] over what went.

Published for heads that are not grouped. Here a unit of attention is a key/value head with its query heads: its score
is the mean over all their inputs. `what: channels` leaves attention alone. New biases are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoders import Peer, Row, feed, linear_numbers, watch
from benchmarks.peers_prune.parts import counted, layers_of, remove_channels


@dataclass
class Moments:
    """Sums over the rows [count, width] that were added, float64."""

    count: int = 0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        self.count += len(rows)
        self.first = self.first + rows.sum(0)
        self.second = self.second + rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.first) / self.count

    @property
    def variance(self) -> Tensor:
        return torch.as_tensor(self.second) / self.count - self.mean.square()


Found = list[tuple[Moments, Moments]]


def settings(keep: float, model: Any) -> list[Row]:
    return [{"keep": keep}, {"keep": keep, "what": "channels"}]


def calibrate(model: Any, windows: Tensor) -> Found:
    """Moments of what output projections read, and down projections, by layer."""
    found = [(Moments(), Moments()) for _ in layers_of(model)]
    seen = {}
    for layer, (attention, mlp) in zip(layers_of(model), found, strict=True):
        seen |= {layer.self_attn.o_proj: attention.add, layer.mlp.down_proj: mlp.add}
    watch(feed(model, windows), seen)
    return found


def scores(linear: nn.Linear, moments: Moments) -> Tensor:
    """Standardised WIFV of each input [n]."""
    fluctuation = moments.variance * linear.weight.double().square().sum(0)
    return (fluctuation - fluctuation.mean()) / fluctuation.std()


def apply(model: Any, found: Found, keep: float, what: str = "all") -> None:
    """Remove what is scored lowest until ``keep`` remains, biases counted."""
    groups = model.config.num_key_value_heads
    units: list[tuple[float, int, int, int]] = []  # score, layer, index of a group or -1, of a channel or -1
    for index, (layer, (attention, mlp)) in enumerate(zip(layers_of(model), found, strict=True)):
        channels = scores(layer.mlp.down_proj, mlp).tolist()
        units += [(score, index, -1, channel) for channel, score in enumerate(channels)]
        if what == "all":
            means = scores(layer.self_attn.o_proj, attention).view(groups, -1).mean(1).tolist()
            units += [(score, index, group, -1) for group, score in enumerate(means)]
    gone = chosen(sorted(units), model, (1 - keep) * linear_numbers(model))
    for layer, moments, (lost_groups, lost_channels) in zip(layers_of(model), found, gone, strict=True):
        if lost_channels:
            compensate(layer.mlp.down_proj, moments[1].mean, torch.tensor(lost_channels))
            remove_channels(layer.mlp, torch.tensor(lost_channels))
        if lost_groups:
            remove_groups(layer.self_attn, moments[0].mean, torch.tensor(lost_groups), groups)


def chosen(units: list[tuple[float, int, int, int]], model: Any, spare: float) -> list[tuple[list[int], list[int]]]:
    """The first of ``units`` that save ``spare`` numbers: groups and channels, by layer."""
    gone: list[tuple[list[int], list[int]]] = [([], []) for _ in layers_of(model)]
    for _, index, group, channel in units:
        if spare <= 1e-6:
            break
        layer, part = layers_of(model)[index], 0 if channel < 0 else 1
        width = layer.mlp.down_proj.out_features
        spare -= 3 * width if part else group_numbers(layer.self_attn, model.config.num_key_value_heads)
        spare += 0 if gone[index][part] else width  # the new bias
        gone[index][part].append(channel if part else group)
    return gone


def group_numbers(attention: Any, groups: int) -> int:
    parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return sum(part.weight.numel() for part in parts) // groups


def compensate(linear: nn.Linear, mean: Tensor, gone: Tensor) -> None:
    """Let the bias give what the inputs ``gone`` gave in the mean."""
    lost = (linear.weight[:, gone].double() @ mean[gone]).float()
    linear.bias = nn.Parameter(lost if linear.bias is None else linear.bias + lost, requires_grad=False)


def remove_groups(attention: Any, mean: Tensor, gone: Tensor, groups: int) -> None:
    """Remove key/value heads with their query heads."""
    inputs = torch.arange(attention.o_proj.in_features).view(groups, -1)[gone].flatten()
    compensate(attention.o_proj, mean, inputs)
    attention.o_proj.weight[:, inputs] = 0
    attention.q_proj.weight[inputs] = 0
    kept = torch.arange(attention.k_proj.out_features).view(groups, -1)[gone].flatten()
    attention.k_proj.weight[kept] = 0
    attention.v_proj.weight[kept] = 0


PEER = Peer(calibrate, counted(apply), settings)
