"""The import tables: what each ATen operation of an exported program is in the graph's vocabulary.

A handler gets the importer, then the operation's own arguments: tensors as values, symbolic sizes as dims. It reads
the result's type from ``importer.out`` where ATen leaves it to inference, and emits graph operations.
"""

from __future__ import annotations

from compiler.frontend.aten import elementwise, placed, resize, shape, whole
from compiler.frontend.aten.shared import Complex, Handler, Masking

TABLES = (elementwise, placed, resize, shape, whole)

HANDLERS: dict[str, Handler] = {name: handler for table in TABLES for name, handler in table.HANDLERS.items()}

TAKES_COMPLEX: frozenset[str] = frozenset({"mul", "view_as_real"})

__all__ = ["HANDLERS", "TAKES_COMPLEX", "Complex", "Handler", "Masking"]
