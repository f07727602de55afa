"""Items of an evaluation: lines of a JSONL file, read one by one and checked, with file and line in every complaint."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from compiler.errors import DataError
from compiler.weights.tensorfile import open_regular

Item = Mapping[str, Any]


def checked_file(path: Path) -> Path:
    """``path``. Raises DataError when it cannot be opened, CheckpointError when it is a pipe or a device."""
    try:
        open_regular(path).close()
    except OSError as reason:
        raise DataError(
            f"cannot read the items: {reason.strerror}", where=str(path), remedy="check the path of `items`"
        ) from reason
    return path


def read_items(path: Path | None, fields: Mapping[str, Any], metric: str) -> Iterator[tuple[Item, str]]:
    """The objects in the lines of ``path`` and where each stands, ``file:line``; empty lines are none.

    ``fields`` maps the names that each must have to the types of their values. Raises DataError when there is no file,
    no item in it, or a line is not such an object; CheckpointError when the file is a pipe or a device.
    """
    if path is None:
        raise DataError(f"`{metric}` needs items", remedy=f"name a JSONL file by `items`; a line has {_shape(fields)}")
    found = 0
    try:
        with open_regular(path) as raw, io.TextIOWrapper(raw, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found += 1
                    yield _item(line, fields, f"{path}:{number}"), f"{path}:{number}"
    except OSError as reason:
        raise DataError(
            f"cannot read the items: {reason.strerror}", where=str(path), remedy="check the path of `items`"
        ) from reason
    except UnicodeDecodeError as reason:
        raise DataError(
            f"is no UTF-8 text: byte {reason.start} of a piece is not", where=str(path), remedy="save it as UTF-8"
        ) from reason
    if not found:
        raise DataError("the file has no items", where=str(path), remedy=f"a line has {_shape(fields)}")


def refuse(cause: str, where: str, remedy: str) -> NoReturn:
    """Raise the DataError that says what is wrong with the item at ``where``."""
    raise DataError(cause, where=where, remedy=remedy)


def _item(line: str, fields: Mapping[str, Any], where: str) -> Item:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as reason:
        raise DataError(f"is no JSON: {reason}", where=where, remedy="write one object a line") from reason
    if not isinstance(found, dict):
        refuse("is no JSON object", where, f"a line has {_shape(fields)}")
    item: dict[str, Any] = found
    for name, kind in fields.items():
        if not isinstance(entry := item.get(name), kind) or isinstance(entry, bool):
            refuse(f"has no `{name}` that is {_spelt(kind)}", where, f"a line has {_shape(fields)}")
    return item


def _shape(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}` ({_spelt(kind)})" for name, kind in fields.items())


def _spelt(kind: Any) -> str:
    names = {str: "a text", list: "a list", int | float: "a number", int | str: "a number or a text"}
    return names[kind]
