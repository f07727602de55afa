"""What a quantised weight is, apart from its values, and what a format is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compiler.weights.expr import Expr


@dataclass(frozen=True)
class Scheme:
    """Codes of ``bits`` bits in groups of ``group`` inputs (0: a whole row), with zero points unless symmetric."""

    bits: int
    group: int
    symmetric: bool

    def weights_config(self) -> dict[str, Any]:
        """The ``weights`` entry of a compressed-tensors config group."""
        strategy = {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        return {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False, **strategy}


@dataclass(frozen=True)
class Format:
    """A storage format of compressed-tensors.

    ``holds(scheme)`` says whether it can store a scheme. ``parts(value)`` are the tensors that stand for a
    ``dequantize`` expression of a matrix [out, in], by the suffix that replaces "weight" in its name.
    """

    name: str
    holds: Callable[[Scheme], bool]
    parts: Callable[[Expr], Mapping[str, Expr]]


def scheme_of(value: Expr) -> Scheme:
    """The scheme of a ``dequantize`` expression."""
    return Scheme(value.attr("bits"), value.attr("group"), symmetric=len(value.args) == 2)
