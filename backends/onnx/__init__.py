"""ONNX models written from graphs: one rule an operation, tensors streamed into files beside the model."""

from backends.onnx.emission import OnnxEmission, propose
from backends.onnx.emit import emit
from backends.onnx.verify import Reloaded, verify

__all__ = ["OnnxEmission", "Reloaded", "emit", "propose", "verify"]
