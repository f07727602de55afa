"""What differs between two checkpoints: config, how they were made, which tensors there are, and their values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiler.console import human_bytes, human_count, table
from compiler.ir.types import TensorType
from compiler.weights.checkpoint import Checkpoint, open_checkpoint

SHOWN = 20


def diff(left: str, right: str, *, values: bool = True, on_progress: Callable[[int, int], None] | None = None) -> str:
    """A text that says how the checkpoint ``right`` differs from ``left``.

    With ``values``, tensors of the same name and type are read and compared, one pair at a time.
    Raises CheckpointError when one cannot be opened.
    """
    a, b = open_checkpoint(left), open_checkpoint(right)
    sections = [
        _totals(a, b),
        _section("config.json", _changes(_flat(a.config), _flat(b.config))),
        _section("made by", _changes(_flat(_lock(a.path)), _flat(_lock(b.path)))),
        _section("tensors", _tensor_changes(a.types, b.types)),
    ]
    if values:
        sections.append(_section("values", _value_changes(a, b, on_progress)))
    return "\n\n".join(sections)


def _section(title: str, lines: Iterable[str]) -> str:
    found = list(lines)
    shown = [f"  {line}" for line in found[:SHOWN]]
    more = [f"  … and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "\n".join([f"{title}: {len(found)} differences" if found else f"{title}: the same", *shown, *more])


def _totals(a: Checkpoint, b: Checkpoint) -> str:
    rows = [("", "tensors", "elements", "bytes", "dtypes")]
    for name, checkpoint in (("A", a), ("B", b)):
        types = list(checkpoint.types.values())
        dtypes = Counter(str(type.dtype).removeprefix("torch.") for type in types)
        rows.append(
            (
                f"{name} {checkpoint.path}",
                str(len(types)),
                human_count(sum(t.numel for t in types)),
                human_bytes(sum(t.nbytes for t in types)),
                " ".join(name for name, _ in dtypes.most_common()),
            )
        )
    return table(rows)


def _changes(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterable[str]:
    for key in sorted({*left, *right}):
        if key not in right:
            yield f"- {key}: {left[key]}"
        elif key not in left:
            yield f"+ {key}: {right[key]}"
        elif left[key] != right[key]:
            yield f"~ {key}: {left[key]} -> {right[key]}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted names."""
    if isinstance(value, Mapping) and value:
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}{name}.").items()}
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return {k: v for index, inner in enumerate(value) for k, v in _flat(inner, f"{prefix}{index}.").items()}
    return {prefix.rstrip("."): value} if prefix else {}


def _lock(path: Path) -> Any:
    """The lock file of a checkpoint that this tool made; {} of any other."""
    file = path / "compress" / "recipe.lock.yaml"
    if not file.is_file():
        return {}
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))


def _tensor_changes(left: Mapping[str, TensorType], right: Mapping[str, TensorType]) -> Iterable[str]:
    shown = ({name: str(type) for name, type in types.items()} for types in (left, right))
    return _changes(*shown)


def _value_changes(a: Checkpoint, b: Checkpoint, on_progress: Callable[[int, int], None] | None) -> Iterable[str]:
    common = [name for name, type in a.types.items() if b.types.get(name) == type]
    for index, name in enumerate(common, 1):
        x, y = a.read(name), b.read(name)
        if not torch.equal(_bits(x), _bits(y)):
            yield f"~ {name}: {_distance(x, y)}"
        if on_progress:
            on_progress(index, len(common))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


def _distance(x: Tensor, y: Tensor) -> str:
    difference, reference = (x.double() - y.double()).norm().item(), x.double().norm().item()
    return f"relative difference {difference / reference:.3g}" if reference else f"difference {difference:.3g}"
