"""What a model is written for: which operations may be used, and of which version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

OPSET = 23
SCATTER, SCATTER_OPSET = "TensorScatter", 24  # writes tokens into a buffer
RECENT, RECENT_RUNTIME = (SCATTER, "QMoE"), "1.31"  # operations, and the ONNX Runtime that they were tried in
IR_VERSION = 11
CONTRIB = "com.microsoft"
CONTRIB_VERSION = 1


@dataclass(frozen=True)
class Target:
    """``contrib``: ONNX Runtime's own operations may be used. ``genai``: onnxruntime-genai runs it. ``real`` is what it
    computes in. ``scatters``: latents are written into buffers, by an operation of opset 24. ``right``: padding lies on
    the right of each sample, never before its tokens. ``runtime`` is the oldest ONNX Runtime that has all.
    """

    name: str
    contrib: bool
    genai: bool = False
    real: torch.dtype = torch.float32
    scatters: bool = False
    right: bool = False
    runtime: str = "1.23"


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("ort-cpu", contrib=True, scatters=True),
        Target("genai", contrib=True, genai=True),
        Target("ort-cuda", contrib=True, real=torch.float16, right=True),
        Target("onnx", contrib=False),
    )
}
"""``ort-cpu`` is fast on a CPU by what ONNX Runtime has beyond the standard, ``genai`` is the same for
onnxruntime-genai; ``ort-cuda`` is in half precision for a GPU, whose grouped attention is given neither masks nor
positions; ``onnx`` runs wherever opset 23 does."""
