"""Tensors of a checkpoint under the names, and in the layout, of a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

import torch

from backends.gguf import rotary
from backends.gguf.architectures import Architecture, Config
from backends.gguf.rotary import head_width
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import add, cast, concat, full, index, stack, transpose
from compiler.weights.ops.gguf.layouts import LAYOUTS
from compiler.weights.rows import as_dequantize

EXPERT = re.compile(r"^(.*\.experts)\.(\d+)(\..*)$")
DENSE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
ALWAYS_FLOAT32 = ("ffn_gate_inp",)  # routers, which llama.cpp multiplies in float32
ROTATED = re.compile(r"attn_[qk]\.(weight|bias)$")

Format = tuple[int, tuple[int, ...]]


@cache
def _names(architecture: str, layers: int) -> Mapping[str, str]:
    """What gguf calls tensors, by what checkpoints of all kinds call them."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(kind, layers).mapping
    return {key: name for key, (_, name) in known.items()}


def named(tensors: Mapping[str, Expr], architecture: Architecture, config: Config) -> dict[str, Expr] | str:
    """``tensors`` by their names in the file, laid out as llama.cpp wants them; or the one that has no place."""
    names = _names(architecture.name, config[architecture.sizes["block_count"]])
    found: dict[str, Expr] = {}
    for key, expr in _experts_together(tensors).items():
        stem, _, suffix = key.rpartition(".")
        if stem.startswith(architecture.unread):
            continue
        name = names.get(stem)
        if name is None:
            return key
        found[f"{name}.{suffix}"] = _laid_out(f"{name}.{suffix}", expr, architecture, config)
    return found | (rotary.tensors(config) if architecture.rotary else {})


def stored(name: str, expr: Expr) -> tuple[Expr, Format]:
    """What is written for a tensor, and the format and shape that the header gives it."""
    value = as_dequantize(expr)
    if value is not None:
        return value.args[0], (LAYOUTS[value.attr("format")].number, value.shape)
    exact = expr.type.rank < 2 or any(part in name for part in ALWAYS_FLOAT32)
    dense = cast(expr, torch.float32) if exact or expr.dtype not in DENSE else expr
    return dense, (DENSE[dense.dtype], dense.shape)


def _experts_together(tensors: Mapping[str, Expr]) -> dict[str, Expr]:
    """Matrices of experts, one each in checkpoints, as one tensor [experts, out, in]."""
    found: dict[str, Expr] = {}
    apart: dict[str, dict[int, Expr]] = {}
    for key, expr in tensors.items():
        match = EXPERT.match(key)
        if match is None:
            found[key] = expr
        else:
            apart.setdefault(match[1] + match[3], {})[int(match[2])] = expr
    return found | {key: stack([each[number] for number in sorted(each)], 0) for key, each in apart.items()}


def _laid_out(name: str, expr: Expr, architecture: Architecture, config: Config) -> Expr:
    if architecture.shifted and name.endswith("norm.weight"):
        wide = cast(expr, torch.float32)
        return add(wide, full(wide.shape, 1.0))
    if architecture.interleaved and ROTATED.search(name):
        return index(expr, 0, _interleaved(expr.shape[0], head_width(config)))
    return _turned(expr) if name.endswith(architecture.turned) else expr


def _turned(expr: Expr) -> Expr:
    """The transpose of a matrix; of one that is itself made of transposes the parts, whose rows stay whole."""
    if expr.op == "transpose":
        return expr.args[0]
    if expr.op == "concat":
        return concat([_turned(part) for part in expr.args], 1 - int(expr.attr("axis")))
    return transpose(expr)


def _interleaved(rows: int, width: int) -> list[int]:
    """Rows such that those of a rotary pair, half a head apart in checkpoints, lie side by side."""
    half = width // 2
    return [head + pair + half * which for head in range(0, rows, width) for pair in range(half) for which in (0, 1)]
