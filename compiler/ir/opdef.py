"""What an operation is: its operands, attributes, type inference, reference evaluation and axis rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from compiler.errors import OpError
from compiler.ir.types import TensorType


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()

Types = Sequence[TensorType | None]
Infer = Callable[[Types, Mapping[str, Any]], list[TensorType]]
Eval = Callable[..., Any]
AxisRule = Callable[[Types, Types, Mapping[str, Any]], str]
Fit = Callable[[Types, Types, Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Attr:
    """An attribute: its kind and default.

    Kinds: ``int float bool text ints dim dims dtype``. A ``dim`` or ``dims`` may be symbolic; ``eval`` receives
    it resolved to integers. ``choices`` restricts a ``text``.
    """

    kind: str
    default: Any = REQUIRED
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpDef:
    """One operation of the closed vocabulary.

    ``operands`` names the inputs: ``"x weight bias?"``; a trailing ``?`` marks an optional one, ``xs*`` any number.
    ``eval`` takes the operand tensors in order (None for an absent one) and the attributes as keywords (defaults
    filled in), and is the reference semantics. ``axes`` says which axes of operands and results correspond, in the
    notation of docs/graph.md, or is a function of the types of operands and results, and the attributes, that does;
    "" means that no rule is known and every axis is frozen. ``fit`` yields, of the same, those attributes that hold
    sizes, when operands and results have become smaller.
    """

    name: str
    operands: str
    infer: Infer
    eval: Eval
    attrs: Mapping[str, Attr] = field(default_factory=dict[str, Attr])
    axes: str | AxisRule = ""
    doc: str = ""
    fit: Fit | None = None

    def normalise_attrs(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        """Check names and kinds; drop attributes equal to their default; sort by declaration order."""
        for name in attrs:
            if name not in self.attrs:
                raise OpError(f"`{self.name}` has no attribute `{name}`", remedy=f"it has: {', '.join(self.attrs)}")
        kept: dict[str, Any] = {}
        for name, spec in self.attrs.items():
            value = attrs.get(name, spec.default)
            if value is REQUIRED:
                raise OpError(f"`{self.name}` needs the attribute `{name}`")
            value = _checked(self.name, name, spec, value)
            if value != spec.default or spec.default is REQUIRED:
                kept[name] = value
        return kept

    def all_attrs(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        """``attrs`` with the defaults filled in."""
        return {name: attrs.get(name, spec.default) for name, spec in self.attrs.items()}

    def axis_rule(self, operands: Types, results: Types, attrs: Mapping[str, Any]) -> str:
        """The axis rule for a node of these types; "" when there is none."""
        return self.axes if isinstance(self.axes, str) else self.axes(operands, results, self.all_attrs(attrs))

    def fitted(self, operands: Types, results: Types, attrs: Mapping[str, Any]) -> dict[str, Any]:
        """``attrs`` for operands and results of these types, whose axes have fewer positions than they had."""
        changed = self.fit(operands, results, self.all_attrs(attrs)) if self.fit else {}
        return self.normalise_attrs({**attrs, **changed})

    def infer_types(self, types: Types, attrs: Mapping[str, Any], scope: str = "") -> list[TensorType]:
        """The output types for operand ``types``. Raises OpError naming the operation and scope."""
        self._check_arity(types, scope)
        padded = list(types) + [None] * (len(self.operands.split()) - len(types))
        try:
            return self.infer(padded, self.all_attrs(attrs))
        except (ValueError, TypeError, IndexError, AttributeError) as reason:
            shown = ", ".join("none" if t is None else str(t) for t in types)
            raise OpError(f"`{self.name}({shown})` {dict(attrs)}: {reason}", where=scope) from reason

    def _check_arity(self, types: Types, scope: str) -> None:
        operands = self.operands.split()
        if any(o.endswith("*") for o in operands):
            return
        required = [o for o in operands if not o.endswith("?")]
        missing = len(types) < len(required) or any(
            t is None and not o.endswith("?") for t, o in zip(types, operands, strict=False)
        )
        if missing or len(types) > len(operands):
            raise OpError(f"`{self.name}` takes ({self.operands}), got {len(types)} operands", where=scope)


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "text": (str,),
    "ints": (tuple,),
    "dim": (int, str),
    "dims": (tuple,),
    "dtype": (torch.dtype,),
}


def _checked(op: str, name: str, spec: Attr, value: Any) -> Any:
    if value is None and spec.default is None:
        return None
    if isinstance(value, list):
        value = tuple(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if spec.kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wrong_bool = isinstance(value, bool) and spec.kind != "bool"
    if wrong_bool or not isinstance(value, _KINDS[spec.kind]):
        raise OpError(f"`{op}` attribute `{name}` must be {spec.kind}, not {value!r}")
    if spec.choices and value not in spec.choices:
        raise OpError(f"`{op}` attribute `{name}` must be one of {', '.join(spec.choices)}, not {value!r}")
    return value
