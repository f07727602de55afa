"""Channels of MLPs by a first-order estimate of the loss without their weights (LLM-Pruner, arXiv 2305.11627).

As Torch-Pruning's `GroupTaylorImportance` does by default: of each channel the sum of |w dL/dw| in each of its three
matrices, averaged over them; gradients of the language-modelling loss are added up over all windows; as many channels
go in every layer. Attention stays: the package has no rule for groups of heads that takes key/value heads out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.decoders import Peer
from benchmarks.peers_prune.parts import counted, cut_channels, layers_of


def calibrate(model: Any, windows: Tensor) -> list[Tensor]:
    """The score of every channel, by layer."""
    matrices = [part.weight for layer in layers_of(model) for part in layer.mlp.children() if hasattr(part, "weight")]
    model.requires_grad_(False)
    for weight in matrices:
        weight.requires_grad_(True)
    for ids in windows:
        model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.backward()
    scores = [_score(layer.mlp) for layer in layers_of(model)]
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return scores


def _score(mlp: Any) -> Tensor:
    rows = [(part.weight * part.weight.grad).detach().abs().sum(1) for part in (mlp.gate_proj, mlp.up_proj)]
    columns = (mlp.down_proj.weight * mlp.down_proj.weight.grad).detach().abs().sum(0)
    return (rows[0] + rows[1] + columns) / 3


PEER = Peer(calibrate, counted(cut_channels))
