"""compress-model: a compiler for trained models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compiler.compress import compress as compress
    from compiler.frontend import capture as capture
    from compiler.ir.graph import Graph as Graph
    from compiler.pipeline import Pipeline as Pipeline
    from compiler.recipe import Recipe as Recipe

__version__ = "0.1.0"

_HOMES = {
    "Graph": "compiler.ir.graph",
    "Pipeline": "compiler.pipeline",
    "Recipe": "compiler.recipe",
    "capture": "compiler.frontend",
    "compress": "compiler.compress",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that the command's help is instant."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
