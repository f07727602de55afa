"""Checkpoints that carry their own code: a readable torch module, written from the graph."""

from __future__ import annotations

from backends.torch_module.caches import cached_bytes
from backends.torch_module.generate import Generated, generate, kernel_calls
from backends.torch_module.packing import as_computed, packed, packed_tensors
from backends.torch_module.sparse import stored

__all__ = ["Generated", "as_computed", "generate", "kernel_calls", "packed", "packed_tensors", "stored"]
