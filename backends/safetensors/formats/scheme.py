"""What a quantised weight is, apart from its values, and what a format is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from backends.safetensors.rounding import Rounding
from compiler.weights.expr import Expr
from compiler.weights.ops.codec import code_bits

Kind = Literal["int", "experts", "real", "codebook", "stack", "fp8", "mx", "e3m2", "nvfp4"]
KINDS: dict[str, Kind] = {"dequantize_fp8": "fp8", "dequantize_mx": "mx", "dequantize_nvfp4": "nvfp4"}
SCALE_DTYPES = {"mx": "torch.uint8", "nvfp4": "torch.float8_e4m3fn"}


@dataclass(frozen=True)
class Scheme:
    """Codes of ``bits`` bits of a ``kind``, with zero points unless symmetric.

    A scale is shared by ``rows`` (0: all) rows of ``group`` (0: all) inputs. ``inputs`` says how what the weight
    multiplies is rounded; None if it is not.
    """

    bits: int
    group: int
    symmetric: bool
    kind: Kind = "int"
    rows: int = 1
    inputs: Rounding | None = None

    def weights_config(self) -> dict[str, Any]:
        """The ``weights`` entry of a compressed-tensors config group."""
        type = "int" if self.kind == "int" else "float"
        shared = {"num_bits": self.bits, "type": type, "symmetric": self.symmetric, "dynamic": False}
        scale_dtype = {"scale_dtype": SCALE_DTYPES[self.kind]} if self.kind in SCALE_DTYPES else {}
        return {**shared, **self._strategy(), **scale_dtype}

    def _strategy(self) -> dict[str, Any]:
        if self.rows == 0:
            return {"strategy": "tensor"}
        if self.rows > 1:
            return {"strategy": "block", "block_structure": [self.rows, self.group]}
        if self.kind == "nvfp4":
            return {"strategy": "tensor_group", "group_size": self.group}
        return {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}


@dataclass(frozen=True)
class Format:
    """A storage format of compressed-tensors.

    ``holds(scheme)`` says whether it can store a scheme. ``parts(value)`` are the tensors that stand for a quantised
    matrix [out, in], by the suffix that replaces "weight" in its name.
    """

    name: str
    holds: Callable[[Scheme], bool]
    parts: Callable[[Expr], Mapping[str, Expr]]


def scheme_of(value: Expr) -> Scheme:
    """The scheme of a quantised weight."""
    if value.op == "dequantize":
        return Scheme(value.attr("bits"), value.attr("group"), symmetric=len(value.args) == 2)
    if value.op == "dequantize_experts":
        return Scheme(code_bits(value), value.attr("group"), symmetric=len(value.args) == 2, kind="experts")
    if value.op == "dequantize_real":
        return Scheme(value.attr("bits"), value.attr("group"), symmetric=False, kind="real")
    if value.op == "dequantize_codebook":
        return Scheme(value.attr("bits"), value.attr("group"), symmetric=False, kind="codebook")
    if value.op == "dequantize_stack":
        return Scheme(code_bits(value), 0, symmetric=True, kind="stack")
    if value.op == "dequantize_mx" and value.attr("of") == "e3m2":
        return Scheme(code_bits(value), value.attr("group"), True, kind="e3m2")
    return Scheme(code_bits(value), value.attr("group"), True, KINDS[value.op], value.attr("rows"))
