"""The closed vocabulary of graph operations, one file per kind.

``OPS`` is the whole language: nothing else can appear in a graph. Third parties add operations through the entry
point ``compress_model.operations``, each naming a tuple of OpDefs.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from importlib.metadata import entry_points

from compiler.errors import OpError
from compiler.ir.opdef import OpDef
from compiler.ir.ops import attention, elementwise, experts, hadamard, nn, rounding, shape, tokens


@lru_cache(maxsize=1)
def operations() -> dict[str, OpDef]:
    """Every operation by name."""
    modules = (nn, attention, experts, hadamard, elementwise, shape, rounding, tokens)
    table = {op.name: op for module in modules for op in module.OPS}
    for point in entry_points(group="compress_model.operations"):
        for op in point.load():
            if op.name in table:
                raise OpError(f"`{point.name}` redefines the operation `{op.name}`")
            table[op.name] = op
    return table


def op_named(name: str) -> OpDef:
    """The operation called ``name``. Raises OpError with the nearest valid name."""
    table = operations()
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, 1)
    raise OpError(f"unknown operation `{name}`", remedy=f"did you mean `{near[0]}`?" if near else "")
