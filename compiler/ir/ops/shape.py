"""Operations that move data without computing."""

from __future__ import annotations

from compiler.ir.opdef import OpDef

OPS: tuple[OpDef, ...] = ()
