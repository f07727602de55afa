"""Checkpoints that carry their own code: a readable torch module, written from the graph."""

from __future__ import annotations

from backends.torch_module.generate import Generated, generate
from backends.torch_module.sparse import stored

__all__ = ["Generated", "generate", "stored"]
