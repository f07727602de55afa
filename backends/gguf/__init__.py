"""GGUF files that llama.cpp loads: ``propose`` finds the architecture and the tensors, ``emit`` writes them."""

from __future__ import annotations

from backends.gguf.emission import GgufEmission, propose
from backends.gguf.write import FILE_NAME, emit

__all__ = ["FILE_NAME", "GgufEmission", "emit", "propose"]
