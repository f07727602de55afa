"""One rule for each operation of the graph: how it becomes ONNX nodes."""

from __future__ import annotations

from collections.abc import Mapping

from backends.onnx.emitters import attention, elementwise, experts, latent, linear, norms, rotary, shape, tokens
from backends.onnx.emitters.rule import Rule

MODULES = (elementwise, shape, linear, norms, rotary, attention, latent, experts, tokens)
RULES: Mapping[str, Rule] = {rule.op: rule for module in MODULES for rule in module.RULES}
