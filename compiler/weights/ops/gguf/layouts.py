"""The block formats by name."""

from __future__ import annotations

from collections.abc import Mapping

from compiler.weights.ops.gguf import legacy, q2_k, q3_k, q4_k, q6_k, ternary
from compiler.weights.ops.gguf.layout import Layout

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout for module in (legacy, q2_k, q3_k, q4_k, q6_k, ternary) for layout in module.LAYOUTS
}
