"""A compiler for trained models: capture a model as one typed graph, rewrite it, write it for stock runtimes.

The public names load on first use, so that the command line starts without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compiler.frontend.capture import capture as capture
    from compiler.ir.graph import Graph as Graph
    from compiler.job import compress as compress
    from compiler.pipeline import Pipeline as Pipeline
    from compiler.recipe import Recipe as Recipe

__version__ = "0.1.0"

_HOMES = {
    "Graph": "compiler.ir.graph",
    "Pipeline": "compiler.pipeline",
    "Recipe": "compiler.recipe",
    "capture": "compiler.frontend.capture",
    "compress": "compiler.job",
}

__all__ = ["Graph", "Pipeline", "Recipe", "capture", "compress"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `compiler` has no attribute `{name}`")
    return getattr(import_module(_HOMES[name]), name)
