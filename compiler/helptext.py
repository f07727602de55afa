"""What ``compress-model passes`` prints, made from the passes themselves."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

from compiler.console import table
from compiler.errors import UsageError, nearest
from compiler.pipeline import Pass
from compiler.recipe.schema import describe, spell_value
from passes import pass_class, pass_names


def pass_list() -> str:
    """One line a pass: key and what it does."""
    rows = [("pass", "does")] + [(key, _summary(pass_class(key))) for key in pass_names()]
    return table(rows, left=2) + "\n\n`compress-model passes NAME` says more."


def pass_help(key: str) -> str:
    """All about one pass: its docstring, when it is exact, and its options. Raises UsageError for an unknown key."""
    if key not in pass_names():
        raise UsageError(f"there is no pass `{key}`", remedy=nearest(key, pass_names()))
    cls = pass_class(key)
    return "\n".join([key, "", _doc(cls), "", _exactness(cls), "", options_table(cls)])


def options_table(cls: type[Pass]) -> str:
    """The options of a pass with their types and defaults."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rows = [("option", "default", "is")]
    for field in dataclasses.fields(cls):
        rows.append((field.name.replace("_", "-"), _default(field), describe(hints[field.name])))
    return table(rows, left=3) if len(rows) > 1 else "It has no options."


def _summary(cls: type[Pass]) -> str:
    return _doc(cls).split("\n\n")[0].replace("\n", " ")


def _doc(cls: type[Pass]) -> str:
    """The docstring of a pass, as a terminal shows code."""
    return (inspect.getdoc(cls) or "").replace("``", "`")


def _exactness(cls: type[Pass]) -> str:
    if cls.exact_when is None:
        return "Exact: never."
    if not cls.exact_when:
        return "Exact: always."
    options = ", ".join(f"{name.replace('_', '-')}: {spell_value(value)}" for name, value in cls.exact_when.items())
    return f"Exact when {options}."


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return spell_value(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return spell_value(field.default_factory())
    return "required"
