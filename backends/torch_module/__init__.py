"""Checkpoints that carry their own code: a readable torch module, written from the graph."""

from __future__ import annotations

from backends.torch_module.caches import cached_bytes
from backends.torch_module.generate import Generated, generate, kernel_calls
from backends.torch_module.packing import as_computed, packed, packed_tensors
from backends.torch_module.sparse import stored
from backends.torch_module.stacks import in_reading_order, with_others

__all__ = [
    "Generated",
    "as_computed",
    "cached_bytes",
    "generate",
    "in_reading_order",
    "kernel_calls",
    "packed",
    "packed_tensors",
    "stored",
    "with_others",
]
