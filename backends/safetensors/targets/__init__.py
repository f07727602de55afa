"""Stock model classes that graphs are written for, one file each, in the order in which they are tried."""

from __future__ import annotations

from backends.safetensors.targets import deepseek_v3, same_family
from backends.safetensors.targets.target import Target

TARGETS: tuple[Target, ...] = (same_family.TARGET, deepseek_v3.TARGET)

__all__ = ["TARGETS", "Target"]
