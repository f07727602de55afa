"""Tasks: operations on shapes without symbols, which are what takes time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compiler.ir.execute import evaluate_dim
from compiler.ir.graph import Node, Param, Value
from compiler.ir.opdef import OpDef
from compiler.ir.types import TensorType

Shape = tuple[int, ...]
FREE = {"reshape", "expand", "slice", "concat", "take", "gather", "arange", "full", "rope_table", "merge_heads"}
"""What runtimes do without moving data, or once. So is whatever makes integers or booleans, but what chooses tokens."""
CHOICES = {"token_select", "token_match"}


@dataclass(frozen=True)
class Task:
    """An operation on operands of these types; ``constant`` are those that are weights.

    ``str(task)`` names it in tables: ``linear(f32[1,128,576], @f32[1536,576])``.
    """

    op: OpDef
    operands: tuple[TensorType | None, ...]
    constant: tuple[bool, ...]
    attrs: Mapping[str, Any]

    def __str__(self) -> str:
        shown = (_shown(*pair) for pair in zip(self.operands, self.constant, strict=True))
        attrs = ", ".join(
            f"{name}={value}" for name, value in self.attrs.items() if self.op.attrs[name].kind != "float"
        )
        return f"{self.op.name}({', '.join(shown)})" + (f" {{{attrs}}}" if attrs else "")

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(t.nbytes for t, known in zip(self.operands, self.constant, strict=True) if t is not None and known)

    @property
    def products(self) -> int:
        """Multiplications in products of matrices; of experts, those of the ones that a token goes through."""
        shapes = [None if type is None else type.static_shape for type in self.operands]
        match self.op.name:
            case "linear" | "conv" | "matmul":
                (result,) = self.op.infer_types(list(self.operands), self.attrs)
                second = _known(shapes[1])
                return result.numel * (second[-2] if self.op.name == "matmul" else math.prod(second[1:]))
            case "attention":
                return _attention(_known(shapes[0]), _known(shapes[1]), _known(shapes[2]))
            case "latent_attention":
                return _latent(_known(shapes[0]), _known(shapes[1]), shapes[2], _known(shapes[3]))
            case "experts":
                gate_up, down = _known(shapes[3])[1:], _known(shapes[4])[1:]
                return math.prod(_known(shapes[1])) * (math.prod(gate_up) + math.prod(down))
            case _:
                return 0


def _known(shape: Shape | None) -> Shape:
    assert shape is not None  # of an operand that is not optional
    return shape


def _attention(query: Shape, key: Shape, value: Shape) -> int:
    """Queries [B, H, T, n] with keys [B, G, S, n], and what they weigh: values [B, G, S, v]."""
    return math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _latent(query: Shape, latent: Shape, rotary: Shape | None, up: Shape) -> int:
    """Attention with the keys and values that ``up`` [H (n + v), r] makes of latents [B, S, r]."""
    unrotated = query[3] - (0 if rotary is None else rotary[2])
    value = up[0] // query[1] - unrotated
    return math.prod(latent) * up[0] + math.prod(query[:3]) * latent[1] * (query[3] + value)


def task_of(node: Node, sizes: Mapping[str, int], changed: Mapping[Value, TensorType]) -> Task | None:
    """What ``node`` does when values have the types in ``changed``, ``sizes`` being what symbols stand for.

    None for what takes no time worth counting.
    """
    computes = node.op.name in CHOICES or any(value.type.dtype.is_floating_point for value in node.outputs)
    if node.op.name in FREE or not computes:
        return None
    operands = [None if value is None else changed.get(value, value.type) for value in node.inputs]
    results = [changed.get(value, value.type) for value in node.outputs]
    attrs = node.attrs
    if not changed.keys().isdisjoint((*node.inputs, *node.outputs)):
        attrs = node.op.fitted(operands, results, attrs)
    return Task(
        node.op,
        tuple(None if type is None else _sized(type, sizes) for type in operands),
        tuple(isinstance(value, Param) for value in node.inputs),
        {name: _sized_attr(node.op.attrs[name].kind, value, sizes) for name, value in attrs.items()},
    )


def _shown(type: TensorType | None, constant: bool) -> str:
    return "none" if type is None else f"{'@' if constant else ''}{type}"


def _sized(type: TensorType, sizes: Mapping[str, int]) -> TensorType:
    return type.with_shape(evaluate_dim(dim, sizes) for dim in type.shape)


def _sized_attr(kind: str, value: Any, sizes: Mapping[str, int]) -> Any:
    if kind == "dims" and value is not None:
        return tuple(evaluate_dim(dim, sizes) for dim in value)
    return evaluate_dim(value, sizes) if kind == "dim" and value is not None else value
