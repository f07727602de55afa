"""What each kernel is measured on: one file a kernel, with ``cases(device)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Peers = Callable[..., dict[str, Callable[[], Any]]]


def no_peers(*inputs: Any) -> dict[str, Callable[[], Any]]:
    """Nothing else computes it."""
    return {}


@dataclass(frozen=True)
class Case:
    """Inputs of one call. ``flops`` that the mathematics needs; ``peers`` of inputs: what else computes the same.

    ``read`` are the bytes of the inputs that must be read, where that is not all of them.
    """

    name: str
    inputs: tuple[Any, ...]
    flops: float
    peers: Peers = field(default=no_peers)
    read: float | None = None


def size_of(*values: Any) -> int:
    """Bytes of the tensors among ``values``."""
    found = {value.data_ptr(): value.numel() * value.element_size() for value in values if isinstance(value, Tensor)}
    return sum(found.values())
