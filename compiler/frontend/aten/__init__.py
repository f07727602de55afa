"""The import tables: what each ATen operation of an exported program is in the graph's vocabulary.

A handler gets the importer, then the operation's own arguments: tensors as values, symbolic sizes as dims. It reads
the result's type from ``importer.out`` where ATen leaves it to inference, and emits graph operations.
"""

from __future__ import annotations

from compiler.frontend.aten import elementwise, resize, shape, whole
from compiler.frontend.aten.shared import Complex, Handler

HANDLERS: dict[str, Handler] = {**elementwise.HANDLERS, **resize.HANDLERS, **shape.HANDLERS, **whole.HANDLERS}

TAKES_COMPLEX: frozenset[str] = frozenset({"mul", "view_as_real"})

__all__ = ["HANDLERS", "TAKES_COMPLEX", "Complex", "Handler"]
