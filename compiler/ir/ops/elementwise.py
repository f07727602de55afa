"""Elementwise operations with broadcasting, reductions and comparisons."""

from __future__ import annotations

from compiler.ir.opdef import OpDef

OPS: tuple[OpDef, ...] = ()
