"""Channels of MLPs by the norm of their weights, as many in every layer (arXiv 1608.08710, as Torch-Pruning's L2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.decoders import Peer
from benchmarks.peers_prune.parts import counted, cut_channels, layers_of


@torch.no_grad()
def calibrate(model: Any, windows: Tensor) -> list[Tensor]:
    """The sum of squares of each channel's weights, by layer."""
    mlps = [layer.mlp for layer in layers_of(model)]
    return [
        mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1) + mlp.down_proj.weight.square().sum(0)
        for mlp in mlps
    ]


PEER = Peer(calibrate, counted(cut_channels))
