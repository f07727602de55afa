"""ONNX models written from graphs: one rule an operation, tensors streamed into files beside the model.

The public names load on first use, so that running a model imports neither torch nor what writes models.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backends.onnx.emission import OnnxEmission as OnnxEmission
    from backends.onnx.emission import propose as propose
    from backends.onnx.levels import measured as measured
    from backends.onnx.reload import Reloaded as Reloaded
    from backends.onnx.reload import verify as verify
    from backends.onnx.runner import Runner as Runner
    from backends.onnx.write import emit as emit

_HOMES = {
    "OnnxEmission": "emission",
    "Reloaded": "reload",
    "Runner": "runner",
    "emit": "write",
    "measured": "levels",
    "propose": "emission",
    "verify": "reload",
}

__all__ = ["OnnxEmission", "Reloaded", "Runner", "emit", "measured", "propose", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `backends.onnx` has no attribute `{name}`")
    return getattr(import_module(f"backends.onnx.{_HOMES[name]}"), name)
