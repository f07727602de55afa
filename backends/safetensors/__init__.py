"""Checkpoints that stock transformers loads: ``require`` finds the class and the tensors, ``emit`` writes them."""

from __future__ import annotations

from backends.safetensors.emission import Emission, Proposal, Refusal, dtype_name, propose, require
from backends.safetensors.emit import emit
from backends.safetensors.parts import stored_tensors

__all__ = ["Emission", "Proposal", "Refusal", "dtype_name", "emit", "propose", "require", "stored_tensors"]
