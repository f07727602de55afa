"""What a target is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backends.safetensors.emission import Proposal, Refusal
from compiler.ir.graph import Graph


@dataclass(frozen=True)
class Target:
    """A stock class. ``propose`` makes a config from a graph's facts, cheaply; it need not be certain to fit."""

    name: str
    propose: Callable[[Graph], Proposal | Refusal]
