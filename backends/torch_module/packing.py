"""Quantised weights as generated modules hold them: codes with scales and zero points or tables, floats, or blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from compiler.ir.graph import Graph, Param
from compiler.ir.layers import copy_of
from compiler.weights.expr import Expr, apply
from compiler.weights.ops.basic import cast
from compiler.weights.ops.expert_widths import by_width
from compiler.weights.ops.minifloat import pack_sextets
from compiler.weights.ops.quant import packed_parts
from compiler.weights.rows import as_dequantize

KERNELS = Path(__file__).parent.parent / "kernels"
SCHEME = "weight_scheme"
"""The entry of the config that says how weights are packed; a module of another scheme has an entry of its own."""

MODULES = {
    "linear": "PackedLinear",
    "latent_attention": "PackedLinear",
    "embedding": "PackedEmbedding",
    "experts": "PackedExperts",
}
"""The module that holds packed integers, by the operation that reads them; of others names begin otherwise."""

OPERANDS = {"linear": (1,), "latent_attention": (3,), "embedding": (0,), "experts": (3, 4)}
"""Where operations read matrices that can be packed."""


PARTS = {
    "dequantize": ("weight_packed", "weight_scale", "weight_zero_point"),
    "dequantize_real": ("weight_packed", "weight_scale", "weight_zero"),
    "dequantize_codebook": ("weight_packed", "weight_table"),
    "dequantize_mx": ("weight_packed", "weight_scale"),
}
STACK, EXPERTS = "dequantize_stack", "dequantize_experts"


class Scheme(NamedTuple):
    """How a weight is packed, by the names that packed modules have for it. A ``group_size`` of 0 is a whole row."""

    bits: int
    group_size: int
    zero_points: bool


class ShiftedScheme(NamedTuple):
    """How a weight is packed whose zero points are no integers. A ``group_size`` of 0 is a whole row."""

    bits: int
    group_size: int


class ExpertsScheme(NamedTuple):
    """How a stack is packed whose matrices have ``widths``, one each."""

    widths: tuple[int, ...]
    group_size: int
    zero_points: bool


class TableScheme(NamedTuple):
    """How a weight with tables is packed: they have ``numbers`` for each group."""

    bits: int
    group_size: int
    numbers: int


class StackScheme(NamedTuple):
    """Of how many ``blocks`` a weight is the sum, and the ``rank`` of what says how large each is."""

    rank: int
    blocks: int


class FloatScheme(NamedTuple):
    """Floats of six bits, of which 32 share a power of two."""

    exponent_bits: int
    mantissa_bits: int


AnyScheme = Scheme | ShiftedScheme | ExpertsScheme | TableScheme | StackScheme | FloatScheme
FLOATS = {"e2m3": FloatScheme(2, 3), "e3m2": FloatScheme(3, 2)}
PREFIXES: dict[type[AnyScheme], str] = {
    Scheme: "Packed",
    ShiftedScheme: "Shifted",
    ExpertsScheme: "Mixed",
    TableScheme: "Codebook",
    StackScheme: "Stacked",
    FloatScheme: "Mx",
}


def module_of(operation: str, scheme: AnyScheme) -> str:
    """The module that holds a weight packed by ``scheme`` for ``operation``."""
    return MODULES[operation].replace("Packed", PREFIXES[type(scheme)])


def packed(param: Param) -> Expr | None:
    """The codes and what goes with them that code holds ``param`` as; None for a weight that it holds otherwise."""
    value = as_dequantize(param.expr)
    if value is None or (value.op == "dequantize_mx" and value.attr("of") not in FLOATS):
        return None
    return value if value.op in PARTS or value.op in (STACK, EXPERTS) else None


def scheme_of(param: Param) -> AnyScheme | None:
    """How ``param`` is packed; None when it is not."""
    value = packed(param)
    if value is None:
        return None
    if value.op == STACK:
        return StackScheme(value.attr("rank"), len(value.args))
    if value.op == "dequantize_mx":
        return FLOATS[value.attr("of")]
    bits, group = value.attr("bits"), value.attr("group")
    if value.op == "dequantize_real":
        return ShiftedScheme(bits, group)
    if value.op == EXPERTS:
        return ExpertsScheme(bits, group, len(value.args) > 2)
    if value.op == "dequantize":
        return Scheme(bits, group, len(value.args) > 2)
    return TableScheme(bits, group, bits + 1 if value.attr("linear") else 1 << bits)


def packed_tensors(path: str, value: Expr) -> dict[str, Expr]:
    """The tensors of the file that stand for the weight ``value`` at ``path``."""
    return {part_path(path, name): part for name, part in zip(part_names(value), _parts(value), strict=True)}


def _parts(value: Expr) -> tuple[Expr, ...]:
    if value.op == STACK:
        return value.args
    if value.op == EXPERTS:
        return tuple(part for stack in by_width(value).values() for part in packed_parts(stack))
    return (pack_sextets(value.args[0]), value.args[1]) if value.op == "dequantize_mx" else packed_parts(value)


def part_names(value: Expr) -> tuple[str, ...]:
    """What the parts of the weight ``value`` are called."""
    if value.op == STACK:
        return tuple(f"weight_block_{index}" for index in range(len(value.args)))
    if value.op == EXPERTS:
        own = PARTS["dequantize"][: len(value.args)]
        return tuple(f"of_{width}_bits.{name}" for width in by_width(value) for name in own)
    return PARTS[value.op][: len(value.args)]


def part_path(path: str, part: str) -> str:
    """Where a part of the packed weight ``path`` is: in a module of its own where no module has held the weight."""
    return f"{path.removesuffix('.weight')}.{part}"


def scheme_name(path: str) -> str:
    """The entry of the config for the packed weight ``path`` where its scheme is not everybody's."""
    return f"{path.removesuffix('.weight').rpartition('.')[2]}_scheme"


def tied_parts(tied: Mapping[str, str], named: Mapping[str, Param]) -> dict[str, str]:
    """Ties between tensors from those between the weights ``named``, which may be packed."""
    found: dict[str, str] = {}
    for path, first in tied.items():
        value = packed(named[first])
        parts = part_names(value) if value is not None else ()
        found |= {part_path(path, part): part_path(first, part) for part in parts} or {path: first}
    return found


def as_computed(graph: Graph) -> Graph:
    """``graph`` with packed weights as generated code makes them of codes and scales, tables or blocks, in float32.

    The graph's own are rounded to the dtype of those, as those of a class that is given dense weights would be.
    """
    weights = {name: value for name, param in graph.params.items() if (value := packed(param)) is not None}
    if not weights:
        return graph
    found = copy_of(graph)
    for name, value in weights.items():
        found.params[name].expr = _in_float32(value)
    return found


def _in_float32(value: Expr) -> Expr:
    if value.op in (STACK, "dequantize_mx"):
        return apply(value.op, value.args, {**dict(value.attrs), "dtype": torch.float32})
    codes, scale, *zeros = value.args
    if value.op == "dequantize_real":  # whose zero points have the dtype of scales
        zeros = [cast(zero, torch.float32) for zero in zeros]
    return apply(value.op, [codes, cast(scale, torch.float32), *zeros], dict(value.attrs))


def shipped(name: str) -> dict[str, str]:
    """The kernel file ``name`` and those that it imports, by file name: their texts."""
    text = (KERNELS / f"{name}.py").read_text(encoding="utf-8")
    found = {f"{name}.py": text}
    for line in text.splitlines():
        if line.startswith("from ."):
            found |= shipped(line.removeprefix("from .").partition(" ")[0])
    return found
