"""What differs between two checkpoints: config, how they were made, which tensors there are, and their values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compiler.console import human_bytes, human_count, table
from compiler.errors import MISSHAPEN, CheckpointError, CompressError
from compiler.ir.types import TensorType
from compiler.weights.checkpoint import open_checkpoint
from compiler.weights.tensorfile import parse_json, read_document, read_header, read_tensor

SHOWN = 40
TOLD = ("relative_error",)  # of the numbers that passes report of a place


class _Files(Protocol):
    """What is compared: a config and tensors. Unlike a model to compress, it may be quantised."""

    path: Path
    config: dict[str, Any]

    @property
    def types(self) -> Mapping[str, TensorType]: ...

    def read(self, key: str) -> Tensor: ...


class _Directory:
    """The safetensors files of a directory, whatever they hold."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config = path / "config.json"
        self.config = parse_json(read_document(config), config) if config.is_file() else {}
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                "the directory holds no safetensors file", where=str(path), remedy="name the directory of a checkpoint"
            )
        self._tensors = {name: (file, stored) for file in files for name, stored in read_header(file).items()}

    @property
    def types(self) -> Mapping[str, TensorType]:
        return {name: stored.type for name, (_, stored) in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        return read_tensor(*self._tensors[key])


def _open(path: str) -> _Files:
    return _Directory(Path(path)) if Path(path).is_dir() else open_checkpoint(path)


def diff(left: str, right: str, *, values: bool = True, on_progress: Callable[[int, int], None] | None = None) -> str:
    """A text that says how the checkpoint ``right`` differs from ``left``.

    With ``values``, tensors of the same name and type are read and compared, one pair at a time.
    Raises CheckpointError when one cannot be opened.
    """
    a, b = _open(left), _open(right)
    sections = [
        _totals(a, b),
        _section("config.json", _changes(_flat(a.config), _flat(b.config))),
        *_history(a.path, b.path),
        _section("tensors", _tensor_changes(a.types, b.types)),
    ]
    if values:
        sections.append(_section("values of the tensors that both have", _value_changes(a, b, on_progress)))
    return "\n\n".join(sections)


def _history(a: Path, b: Path) -> list[str]:
    """How both were made, and what passes did; of a checkpoint and one that this tool made of it, the latter alone."""
    locks, done = (_lock(a), _lock(b)), (_done(a), _done(b))
    if bool(locks[0]) != bool(locks[1]):
        name = "A" if locks[0] else "B"
        return [f"made by: {name} is an output of compress-model, the other is none; {name}/README.md says how"]
    return [
        _section("made by", _changes(*map(_flat, locks))),
        _section("what passes did, and the error it made", _changes(*done)),
    ]


def _section(title: str, lines: Iterable[str]) -> str:
    found = list(lines)
    shown = [f"  {line}" for line in found[:SHOWN]]
    more = [f"  … and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "\n".join([f"{title}: {len(found)} differences" if found else f"{title}: the same", *shown, *more])


def _totals(a: _Files, b: _Files) -> str:
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
    from compiler.recipe.yamltree import read_tree

    try:
        return read_tree(file).plain()
    except CompressError as reason:
        raise _unreadable(file, reason.cause) from reason


def _done(path: Path) -> dict[str, str]:
    """By pass and place what the report of a run says: ``int4, …`` and its numbers; {} of any other checkpoint."""
    file = path / "compress" / "report.json"
    if not file.is_file():
        return {}
    passes = parse_json(read_document(file), file).get("passes", [])
    try:
        return {f"{step['name']} {one['scope']}": _told(one) for step in passes for one in step["rewritten"]}
    except MISSHAPEN as reason:
        raise _unreadable(file, "it is no report of a run") from reason


def _unreadable(file: Path, cause: str) -> CheckpointError:
    remedy = "delete the folder `compress` to compare the weights alone, or make the output again"
    return CheckpointError(f"{file.name} cannot be read: {cause}", where=str(file), remedy=remedy)


def _told(one: Mapping[str, Any]) -> str:
    numbers = (
        f"{name.replace('_', ' ')} {one['numbers'][name]:.3g}" for name in sorted(one["numbers"]) if name in TOLD
    )
    return ", ".join([one["what"], *numbers])


def _tensor_changes(left: Mapping[str, TensorType], right: Mapping[str, TensorType]) -> Iterable[str]:
    shown = ({name: str(type) for name, type in types.items()} for types in (left, right))
    return _changes(*shown)


def _value_changes(a: _Files, b: _Files, on_progress: Callable[[int, int], None] | None) -> Iterable[str]:
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
