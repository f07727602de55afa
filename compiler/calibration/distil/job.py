"""What is trained, and on what."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from compiler.calibration.distil.windows import Windows
from compiler.ir.graph import Graph, Param
from compiler.pipeline import Context


@dataclass(frozen=True)
class Job:
    """Train ``params`` of ``graph`` so that it computes what ``original`` does. ``key`` names this very work.

    ``means``: what is compared end to end are means over tokens.
    """

    graph: Graph
    original: Graph
    ctx: Context
    params: Sequence[Param]
    windows: Windows
    rate: float
    seed: int
    key: str
    means: bool = False


def key_of(params: Sequence[Param], *options: object) -> str:
    """A name that changes with the weights that are to be trained and with how."""
    text = "\n".join([*map(str, options), *(f"{param.name} {param.expr.key}" for param in params)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
