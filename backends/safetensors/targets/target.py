"""What a target is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backends.safetensors.emission import Proposal, Refusal
from compiler.ir.graph import Graph


@dataclass(frozen=True)
class Target:
    """A stock class. ``propose`` makes configs from a graph's facts, the likeliest first; none needs to fit."""

    name: str
    propose: Callable[[Graph], tuple[Proposal, ...] | Refusal]
