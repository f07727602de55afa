"""Weights that are stacks of blocks, of which a loader reads as many as memory allows: which it reads first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from backends.torch_module.packing import STACK, packed, part_path
from compiler.ir.graph import Param
from compiler.weights.expr import Expr

MEMORY, ENTRY = "memory", "stack"
"""Entries of the config: how much is held, and the rest of what loaders have to know."""


class _Block(NamedTuple):
    """The block ``number`` of the weight at ``path``."""

    path: str
    number: int
    value: Expr

    @property
    def name(self) -> str:
        return part_path(self.path, f"weight_block_{self.number}")

    @property
    def place(self) -> tuple[float, str, int]:
        """What blocks are sorted by: those that are worth most come first."""
        return -self.value.attr("worth")[self.number], self.path, self.number


def stack_config(tensors: Mapping[str, Param], tied: Mapping[str, str]) -> dict[str, Any]:
    """The entries of the config for stacks among ``tensors``; none where there are none.

    ``weights`` numbers them by module, ``tied`` ones under each name, ``bytes`` has the size of a block of each,
    ``order`` the numbers of the weights that blocks belong to, first block first, and ``before`` the bytes that all
    tensors took before any was compressed.
    """
    blocks = _in_order(tensors)
    if not blocks:
        return {}
    sizes = {block.path: block.value.args[0].type.nbytes for block in blocks}
    numbers = {path: number for number, path in enumerate(sorted(sizes))}
    names = {**numbers, **{path: numbers[first] for path, first in tied.items() if first in numbers}}
    entry = {
        "weights": {path.removesuffix(".weight"): number for path, number in names.items()},
        "bytes": [sizes[path] for path in numbers],
        "order": [numbers[block.path] for block in blocks],
        "before": sum(param.type.with_dtype(param.storage).nbytes for param in tensors.values()),
    }
    return {MEMORY: "all", ENTRY: entry}


def with_others(config: dict[str, Any], tensors: Mapping[str, Expr]) -> dict[str, Any]:
    """``config`` with the bytes of all ``tensors`` of the file that are no blocks, where it has stacks."""
    if ENTRY not in config:
        return config
    entry: Mapping[str, Any] = config[ENTRY]
    blocks = sum(entry["bytes"][number] for number in entry["order"])
    return {**config, ENTRY: {**entry, "others": sum(expr.type.nbytes for expr in tensors.values()) - blocks}}


def in_reading_order(tensors: Mapping[str, Expr], params: Mapping[str, Param]) -> dict[str, Expr]:
    """``tensors`` of a file with those that are always read in front, and blocks in the order they are read in."""
    blocks = [block.name for block in _in_order(params)]
    first = {name: expr for name, expr in tensors.items() if name not in {*blocks}}
    return {**first, **{name: tensors[name] for name in blocks}}


def _in_order(tensors: Mapping[str, Param]) -> list[_Block]:
    found = {path: value for path, param in tensors.items() if (value := packed(param)) is not None}
    stacks = {path: value for path, value in found.items() if value.op == STACK}
    blocks = [_Block(path, index, value) for path, value in stacks.items() for index in range(len(value.args))]
    return sorted(blocks, key=lambda block: block.place)
