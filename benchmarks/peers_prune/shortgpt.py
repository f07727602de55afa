"""Whole layers by block influence (ShortGPT, arXiv 2403.03853): 1 - E cos(what enters, what leaves), the lowest go.

Layers come in whole numbers: where ``keep`` falls between two, both are measured.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from benchmarks.decoders import Peer, Row
from benchmarks.peers_prune.parts import counted, influences, layers_of


def settings(keep: float, model: Any) -> list[Row]:
    gone = round((1 - keep) * len(layers_of(model)), 6)
    return [{"layers": each} for each in dict.fromkeys((math.floor(gone), math.ceil(gone)))]


def apply(model: Any, influence: list[float], layers: int) -> None:
    """Take ``layers`` of them out."""
    gone = sorted(range(len(influence)), key=influence.__getitem__)[:layers]
    kept = [layer for index, layer in enumerate(layers_of(model)) if index not in gone]
    model.base_model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)


PEER = Peer(influences, counted(apply), settings)
