"""Which tensor goes into which file at which byte, decided from types alone before anything is computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from compiler.errors import OutputError
from compiler.weights.expr import Expr
from compiler.weights.tensorfile import DTYPE_CODES, header_bytes

SHARD_BYTES = 5_000_000_000
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One file: its name and its tensors in the order of their bytes."""

    name: str
    tensors: Mapping[str, Expr]

    @cached_property
    def header(self) -> bytes:
        """The file's first bytes; tensors follow without gaps."""
        return header_bytes({name: expr.type for name, expr in self.tensors.items()})

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """The position of every tensor's first byte in the file."""
        position, offsets = len(self.header), dict[str, int]()
        for name, expr in self.tensors.items():
            offsets[name] = position
            position += expr.type.nbytes
        return offsets

    @property
    def tensor_bytes(self) -> int:
        return sum(expr.type.nbytes for expr in self.tensors.values())

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.tensor_bytes


def layout(tensors: Mapping[str, Expr], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Files of at most ``shard_bytes`` of tensors (a single larger tensor has its own), filled in order.

    Within a file wide dtypes come first, so that every tensor is aligned to its element size.
    Raises OutputError when there is nothing to write or a dtype cannot be stored.
    """
    if not tensors:
        raise OutputError("there is no tensor to write")
    for name, expr in tensors.items():
        if expr.dtype not in DTYPE_CODES:
            raise OutputError(
                f"tensor {name} is {expr.dtype}, which safetensors cannot hold",
                remedy=f"store it as one of {', '.join(DTYPE_CODES.values())}",
            )
    parts = _fill(tensors, shard_bytes)
    return [Shard(_shard_name(i, len(parts)), _aligned(part)) for i, part in enumerate(parts)]


def index_text(shards: Sequence[Shard]) -> str:
    """The text of the index beside several shards."""
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    total = sum(shard.tensor_bytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def layout_digest(shards: Sequence[Shard]) -> str:
    """Equal for equal files: names, headers and the expressions behind every tensor."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(shard.name.encode() + shard.header)
        for expr in shard.tensors.values():
            digest.update(expr.key.encode())
    return digest.hexdigest()


def _fill(tensors: Mapping[str, Expr], shard_bytes: int) -> list[dict[str, Expr]]:
    parts: list[dict[str, Expr]] = [{}]
    held = 0
    for name, expr in tensors.items():
        if parts[-1] and held + expr.type.nbytes > shard_bytes:
            parts.append({})
            held = 0
        parts[-1][name] = expr
        held += expr.type.nbytes
    return parts


def _aligned(part: Mapping[str, Expr]) -> dict[str, Expr]:
    return dict(sorted(part.items(), key=lambda item: -item[1].dtype.itemsize))


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"
