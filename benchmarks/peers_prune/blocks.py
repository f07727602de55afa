"""Magnitude and FLAP for encoders: MLPs of two matrices, attention whose heads are not grouped, biases everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.decoders import watch
from benchmarks.peers_prune.flap import Moments, compensate, scores


@dataclass(frozen=True)
class Mlp:
    first: nn.Linear
    second: nn.Linear

    @property
    def units(self) -> int:
        return self.second.in_features

    @property
    def reader(self) -> nn.Linear:
        return self.second

    @property
    def writers(self) -> tuple[nn.Linear, ...]:
        return (self.first,)


@dataclass(frozen=True)
class Attention:
    writers: tuple[nn.Linear, ...]  # queries, keys, values
    reader: nn.Linear
    units: int


Block = Mlp | Attention
Forward = Callable[[], None]


def linears_of(blocks: Sequence[Block]) -> dict[str, nn.Linear]:
    parts = [part for block in blocks for part in (*block.writers, block.reader)]
    return {str(index): part for index, part in enumerate(parts)}


def numbers_of(blocks: Sequence[Block]) -> int:
    return sum(part.weight.numel() for part in linears_of(blocks).values())


def unit_numbers(block: Block) -> int:
    """Weights and biases of one head, or of one channel."""
    tensors = [block.reader.weight] + [each for part in block.writers for each in (part.weight, part.bias)]
    return sum(tensor.numel() for tensor in tensors if tensor is not None) // block.units


def remove(block: Block, gone: Tensor) -> None:
    """Set heads or channels to zero."""
    places = torch.arange(block.reader.in_features).view(block.units, -1)[gone].flatten()
    block.reader.weight[:, places] = 0
    for part in block.writers:
        part.weight[places] = 0
        if part.bias is not None:
            part.bias[places] = 0


@torch.no_grad()
def magnitude(blocks: Sequence[Block], forward: Forward, keep: float) -> None:
    """As many channels of every MLP, by the norm of their weights."""
    mlps = [block for block in blocks if isinstance(block, Mlp)]
    count = math.ceil((1 - keep) * numbers_of(blocks) / sum(map(unit_numbers, mlps)) - 1e-9)
    for mlp in mlps:
        energy = mlp.first.weight.square().sum(1) + mlp.second.weight.square().sum(0)
        remove(mlp, energy.argsort()[:count])


@torch.no_grad()
def flap(blocks: Sequence[Block], forward: Forward, keep: float) -> None:
    """Heads and channels under one threshold of standardised fluctuation; their means go into the biases."""
    moments = [Moments() for _ in blocks]
    watch(forward, {block.reader: each.add for block, each in zip(blocks, moments, strict=True)})
    units = [
        (score, index, unit)
        for index, (block, each) in enumerate(zip(blocks, moments, strict=True))
        for unit, score in enumerate(scores(block.reader, each).view(block.units, -1).mean(1).tolist())
    ]
    spare, gone = (1 - keep) * numbers_of(blocks), [list[int]() for _ in blocks]
    for _, index, unit in sorted(units):
        if spare <= 1e-6:
            break
        spare -= unit_numbers(blocks[index])
        gone[index].append(unit)
    for block, each, lost in zip(blocks, moments, gone, strict=True):
        places = torch.arange(block.reader.in_features).view(block.units, -1)[lost].flatten()
        compensate(block.reader, each.mean, places)
        remove(block, torch.tensor(lost, dtype=torch.int64))
