"""Experts of any module that follows transformers' experts interface, in the one layout of our operation.

What the gate computes is found by trying: the module's own gating is run on random numbers and must equal one of
the forms that the operation knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compiler.ir.graph import Value
from compiler.ir.ops.experts import GATES, gate
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import reshape, transpose

if TYPE_CHECKING:
    from compiler.frontend.importer import Importer

_SLOTS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


def expert_operands(importer: Importer, parameters: Sequence[Value]) -> tuple[list[Value | None], dict[str, Any]]:
    """The weight operands of ``experts`` in canonical layout, and its attributes.

    Raises CaptureError when the module holds other parameters or computes another gate.
    """
    module: Any = importer.subject.module.get_submodule(importer.scope)
    names = [name for name, _ in module.named_parameters()]
    given = dict(zip(names, parameters, strict=True))
    if set(given) - set(_SLOTS) or not module.has_gate or module.has_post_expert_norm:
        raise importer.fail(f"experts of the form `{type(module).__name__}` are not in the graph's vocabulary")
    for name in _SLOTS:
        if name in given:
            given[name] = importer.rebind(given[name], lambda expr, name=name: _canonical(expr, name, module))
    return [given.get(name) for name in _SLOTS], _gate_form(importer, module)


def _canonical(expr: Expr, name: str, module: Any) -> Expr:
    """Rows are outputs, and the gate's rows come before the up rows."""
    if module.is_transposed and expr.type.rank == 3:
        expr = transpose(expr)
    if module.is_concatenated or not name.startswith("gate_up"):
        return expr
    experts, rows, *rest = expr.shape
    pairs = reshape(expr, (experts, rows // 2, 2, *rest))
    return reshape(transpose(pairs, (0, 2, 1, *range(3, 3 + len(rest)))), expr.shape)


def _gate_form(importer: Importer, module: nn.Module) -> dict[str, Any]:
    sample = torch.linspace(-9.0, 9.0, 64, device="cpu").reshape(4, 16)
    own = _own_gate(module, sample)
    alpha, limit = float(getattr(module, "alpha", 1.0)), float(getattr(module, "limit", 0.0))
    for activation in (*GATES, "clamped_swish"):
        if torch.equal(own, gate(sample, activation, alpha, limit)):
            clamped = {"alpha": alpha, "limit": limit} if activation == "clamped_swish" else {}
            return {"activation": activation, **clamped}
    raise importer.fail(f"the gate of `{type(module).__name__}` is not in the graph's vocabulary")


def _own_gate(module: Any, halves: Tensor) -> Tensor:
    """The module's gate on [..., 2F] whose first half is the gate, whatever order the module itself uses."""
    if module.is_concatenated:
        return module._apply_gate(halves)
    first, second = halves.chunk(2, -1)
    return module._apply_gate(torch.stack((first, second), -1).flatten(-2))
