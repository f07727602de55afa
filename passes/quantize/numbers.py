"""Number systems: what the options of a recipe mean as a codec, and which of them go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from compiler.errors import PassError
from compiler.ir.graph import Param, Value
from compiler.weights.ops.codebook import Codebook
from compiler.weights.ops.codec import Codec
from compiler.weights.ops.fp8 import Fp8
from compiler.weights.ops.gguf.blocks import Blocks
from compiler.weights.ops.gguf.layouts import LAYOUTS
from compiler.weights.ops.integer import Integer
from compiler.weights.ops.mx import ELEMENTS, Mx
from compiler.weights.ops.nvfp4 import Nvfp4, divisor
from compiler.weights.ops.real_zeros import RealZeros
from compiler.weights.ops.ternary import BITS as BITS_OF_TERNARY
from compiler.weights.ops.ternary import Ternary

Gguf = Literal[
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "tq1_0", "tq2_0"
]  # fmt: skip
Mxfp = Literal["mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8"]
Type = Literal["int", "ternary", "codebook", "bit-serial", "fp8", "nvfp4"] | Mxfp | Gguf
Zeros = Literal["integer", "real"]
Per = Literal["row", "tensor", "block"]
Width = Literal[2, 3, 4, 5, 6, 7, 8]

MX: dict[str, Literal["e2m1", "e2m3", "e3m2", "e4m3"]] = {
    "mxfp4": "e2m1", "mxfp6-e2m3": "e2m3", "mxfp6-e3m2": "e3m2", "mxfp8": "e4m3"
}  # fmt: skip
BITS = {
    "fp8": 8,
    "nvfp4": 4,
    "ternary": BITS_OF_TERNARY,
    **{name: ELEMENTS[of].bits for name, of in MX.items()},
    **{name: layout.bits for name, layout in LAYOUTS.items()},
}
GROUPS = {"fp8": 0, "nvfp4": 16, **dict.fromkeys(MX, 32), **{name: layout.size for name, layout in LAYOUTS.items()}}
BLOCK = 128
SQUARES, ROBUST = 2.0, 0.7  # powers of errors that scales are chosen by
DEFAULT_BITS = 8
FREE = ("int", "codebook", "bit-serial")
"""Types whose bits and groups can be chosen."""
TABLES = ("codebook", "bit-serial")
TABLE_BITS = (2, 3, 4)


@dataclass(frozen=True)
class NumberSystem:
    """What codes stand for: the options of the pass that say so."""

    type: Type
    bits: int
    group: int
    symmetric: bool
    per: Per
    search: bool
    power: float = SQUARES
    zeros: Zeros = "integer"

    def check(self) -> None:
        """Raises PassError for an option that the type does not have."""
        if self.power != SQUARES and self.type != "int":
            cause = f"`scale: robust` is for integers, not for {self.type}"
            raise PassError(cause, option="scale", remedy="leave `scale` out")
        if self.zeros == "real":
            self._check_zeros()
        if not self.search and self.type in (*TABLES, "ternary"):
            cause = (
                f"`scale: minmax` is for evenly spaced codes and floats: what codes of {self.type} stand for is fitted"
            )
            raise PassError(cause, option="scale", remedy="leave `scale` out")
        if self.per != "row" and self.type != "fp8":
            raise PassError(f"`per` is an option of fp8, not of {self.type}", option="per", remedy=_groups(self.type))
        if self.type in TABLES:
            self._check_table()
        if self.type in FREE:
            return
        if self.bits not in (DEFAULT_BITS, BITS[self.type]):
            raise PassError(f"{self.type} has {BITS[self.type]} bits", option="bits", remedy="leave `bits` out")
        if not self.symmetric:
            raise PassError(f"{self.type} has no zero points", option="symmetric", remedy="leave `symmetric` out")
        if self.type != "ternary" and self.group not in (0, GROUPS[self.type]):
            raise PassError(_groups(self.type), option="group", remedy="leave `group` out")

    def _check_zeros(self) -> None:
        if self.type != "int" or self.symmetric:
            cause = "there are no zero points that might be any numbers"
            raise PassError(cause, option="zeros", remedy="say `type: int` and `symmetric: false`")
        if not self.search:
            cause = "`scale: minmax` rounds zero points to integers"
            raise PassError(cause, option="scale", remedy="leave `scale` out: real zero points are fitted")

    def _check_table(self) -> None:
        if self.bits not in TABLE_BITS:
            raise PassError(f"{self.type} has 2 to 4 bits, not {self.bits}", option="bits", remedy="say `bits: 3`")
        if not self.symmetric:
            cause = f"tables of {self.type} are as asymmetric as weights are"
            raise PassError(cause, option="symmetric", remedy="leave `symmetric` out")

    @property
    def fixed_group(self) -> int:
        """The inputs that share a scale because the type says so; 0 when it does not."""
        return GROUPS.get(self.type, 0)

    def codec(self, dtype: torch.dtype) -> Codec:
        """The codec of weights stored in ``dtype``."""
        match self.type:
            case "int" if self.zeros == "real":
                return RealZeros(self.bits, self.group, dtype, self.power)
            case "int":
                return Integer(self.bits, self.group, dtype, self.symmetric, self.search, self.power)
            case "ternary":
                return Ternary(BITS_OF_TERNARY, self.group, dtype)
            case "codebook" | "bit-serial":
                return Codebook(self.bits, self.group, dtype, linear=self.type == "bit-serial")
            case "fp8":
                rows, group = {"row": (1, 0), "tensor": (0, 0), "block": (BLOCK, BLOCK)}[self.per]
                return Fp8(dtype, rows, group, self.search)
            case "mxfp4" | "mxfp6-e2m3" | "mxfp6-e3m2" | "mxfp8":
                return Mx(dtype, search=self.search, of=MX[self.type])
            case "nvfp4":
                return Nvfp4(dtype, search=self.search)
            case _:
                return Blocks(self.type, self.search)

    def codecs(self, params: Sequence[Param]) -> dict[Param, Codec]:
        """The codec of each weight. In NVFP4 weights of one input share what divides their scales."""
        found = {param: self.codec(param.storage) for param in params}
        for group in _of_one_input(params) if self.type == "nvfp4" else ():
            shared = divisor([param.expr for param in group])
            found.update({param: Nvfp4(param.storage, search=self.search, shared=shared) for param in group})
        return found

    def __str__(self) -> str:
        if self.type in TABLES:
            return f"{self.type} of {self.bits} bits, {f'groups of {self.group}' if self.group else 'one table a row'}"
        if self.type not in ("int", "ternary"):
            per = {"row": "one scale a row", "tensor": "one scale", "block": f"a scale for {BLOCK} x {BLOCK}"}
            return f"{self.type}, {per[self.per] if self.type == 'fp8' else f'groups of {GROUPS[self.type]}'}"
        per = f"groups of {self.group}" if self.group else "one scale a row"
        if self.type == "ternary":
            return f"ternary, {per}"
        zeros = "symmetric" if self.symmetric else "real zero points" if self.zeros == "real" else "asymmetric"
        return f"int{self.bits}, {zeros}, {per}"


def _of_one_input(params: Sequence[Param]) -> list[list[Param]]:
    """Matrices that multiply the same value, where there are several."""
    found: dict[Value, list[Param]] = {}
    for param in params:
        node = param.single_user()
        if node is not None and node.op.name == "linear" and param.type.rank == 2:
            found.setdefault(node.input(0), []).append(param)
    return [group for group in found.values() if len(group) > 1]


def _groups(type: Type) -> str:
    if type in FREE:
        return "`group` says how many inputs share a scale"
    if type == "fp8":
        return "fp8 has no groups: `per` says what shares a scale"
    return f"{type} has groups of {GROUPS[type]}"
