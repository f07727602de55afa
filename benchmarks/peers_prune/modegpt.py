"""MoDeGPT (arXiv 2408.09632): pairs of matrices reduced together, by what of the layer's output can be restored.

MLPs (type I, Nyström): channels with the highest ridge leverage [C (C + λ)⁻¹]_ii stay, C = E[h hᵀ] of what the down
projection reads; W_d' = W_d C[:,S] (C[S,S] + λ)⁻¹. Queries and keys (type II, CR): dimensions of a head with greatest
‖C^½ W_q,i‖ ‖C^½ W_k,i‖ stay, C of the layer's normed input. Values and output (type III, SVD): the best W_v, W_o of the
rank for C^½ W_vᵀ W_oᵀ. Layer l loses φ_l = L φ softmax(-s / ε)_l, s the block influence, ε = 0.1, φ_l at most 0.9.
λ is a hundredth of the median of C's diagonal, as few tokens of huge norm decide the mean.

Where heads are grouped, a key/value head is reduced together with all its query heads: norms of queries of a dimension
are summed over these heads as squares, and output columns of these heads stand side by side in the SVD. Both
dimensions of a rotary pair stay or go together, by the norms of the pair; each keeps its own frequency.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoders import Peer, feed, watch
from benchmarks.peers_prune.parts import counted, influences, layers_of, remove_channels

TEMPERATURE = 0.1
MOST = 0.9
RIDGE = 1e-2


@dataclass
class Found:
    """Second moments by layer, float64: of the attention's input [D, D] and of the MLP's channels [I, I]."""

    inputs: list[Tensor]
    channels: list[Tensor]
    influence: list[float]


def calibrate(model: Any, windows: Tensor) -> Found:
    def empty(width: int) -> Tensor:
        return torch.zeros(width, width, dtype=torch.float64)

    layers = list(layers_of(model))
    inputs = [empty(layer.self_attn.q_proj.in_features) for layer in layers]
    channels = [empty(layer.mlp.down_proj.in_features) for layer in layers]

    def into(total: Tensor) -> Any:
        return lambda rows: total.add_(rows.T @ rows, alpha=1 / windows.numel())

    readers = [layer.self_attn.q_proj for layer in layers] + [layer.mlp.down_proj for layer in layers]
    watch(feed(model, windows), dict(zip(readers, map(into, inputs + channels), strict=True)))
    return Found(inputs, channels, influences(model, windows))


def sparsities(influence: list[float], average: float) -> list[float]:
    """The part that each layer loses, ``average`` over all; what one cannot lose the others do."""
    share = torch.softmax(-torch.tensor(influence, dtype=torch.float64) / TEMPERATURE, 0)
    full = torch.zeros(len(share), dtype=torch.bool)
    for _ in range(len(share)):
        rest = len(share) * average - MOST * full.sum()
        found = torch.where(full, MOST, rest * share / share[~full].sum())
        if (found <= MOST + 1e-12).all():
            return found.tolist()
        full |= found > MOST
    return found.tolist()


def apply(model: Any, found: Found, keep: float) -> None:
    for index, (layer, lost) in enumerate(zip(layers_of(model), sparsities(found.influence, 1 - keep), strict=True)):
        groups, attention, mlp = model.config.num_key_value_heads, layer.self_attn, layer.mlp
        head = attention.k_proj.out_features // groups
        pairs, rank = int((1 - lost) * head / 2 + 1e-9), int((1 - lost) * head + 1e-9)
        reduce_query_key(attention, found.inputs[index], groups, pairs)
        reduce_value_output(attention, found.inputs[index], groups, rank)
        # What rounding took from attention the MLP keeps.
        widths = attention.q_proj.out_features + attention.k_proj.out_features, attention.q_proj.in_features
        whole = 2 * widths[0] * widths[1] + 3 * mlp.down_proj.weight.numel()
        left = (1 - lost) * whole - widths[0] * widths[1] * (2 * pairs + rank) / head
        reduce_mlp(mlp, found.channels[index], int(left / (3 * widths[1]) + 1e-9))


def reduce_mlp(mlp: Any, second: Tensor, count: int) -> None:
    """Type I: ``count`` channels stay."""
    if count >= len(second):
        return
    eye = torch.eye(len(second), dtype=second.dtype) * RIDGE * second.diagonal().median()
    leverage = torch.linalg.solve(second + eye, second).diagonal()
    order = leverage.argsort(descending=True)
    kept, gone = order[:count], order[count:]
    among = second[kept][:, kept] + eye[:count, :count]
    restored = torch.linalg.solve(among, second[kept] @ mlp.down_proj.weight.double().T).T
    remove_channels(mlp, gone)
    mlp.down_proj.weight[:, kept] = restored.float()


def reduce_query_key(attention: Any, second: Tensor, groups: int, pairs: int) -> None:
    """Type II: ``pairs`` rotary pairs of every key/value head stay."""

    def energy(weight: Tensor) -> Tensor:
        """Of every pair, summed over the heads of each group [groups, head / 2]."""
        rows = torch.einsum("oi,ij,oj->o", weight.double(), second, weight.double())
        return rows.view(groups, -1, 2, weight.shape[0] // groups // heads(weight) // 2).sum((1, 2))

    def heads(weight: Tensor) -> int:
        return weight.shape[0] // attention.k_proj.out_features

    scores = energy(attention.q_proj.weight).sqrt() * energy(attention.k_proj.weight).sqrt()
    gone = torch.ones_like(scores, dtype=torch.bool).scatter(1, scores.topk(pairs).indices, False)
    for weight in (attention.q_proj.weight, attention.k_proj.weight):
        rows = gone[:, None, None].expand(-1, heads(weight), 2, -1).flatten()
        weight[rows] = 0


def reduce_value_output(attention: Any, second: Tensor, groups: int, rank: int) -> None:
    """Type III: ``rank`` dimensions of every key/value head stay."""
    values, outputs = attention.v_proj.weight, attention.o_proj.weight
    head = values.shape[0] // groups
    if rank >= head:
        return
    lift = torch.linalg.cholesky(second + 1e-9 * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype))
    for group in range(groups):
        rows = slice(group * head, (group + 1) * head)
        value = values[rows].double()
        columns = outputs.view(len(outputs), groups, -1, head)[:, group]  # [D, heads of the group, head]
        output = columns.double().permute(2, 1, 0).flatten(1)  # [head, heads x D]
        _, sizes, basis = torch.linalg.svd(lift.T @ value.T, full_matrices=False)
        left, sigma, right = torch.linalg.svd(sizes[:, None] * basis @ output, full_matrices=False)
        values[rows] = 0
        values[rows][:rank] = (((basis.T / sizes) @ left[:, :rank]).T @ value).float()
        made = (sigma[:rank, None] * right[:rank]).view(rank, -1, len(outputs)).permute(2, 1, 0).float()
        columns.zero_()
        columns[..., :rank] = made


PEER = Peer(calibrate, counted(apply))
