"""Templates, and small pieces of Python source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )


def render(template: str, **context: Any) -> str:
    return environment().get_template(template).render(**context).rstrip("\n")


def strings(values: list[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"


def mapping(values: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'"{key}": "{value}"' for key, value in values.items()) + "}" if values else ""


def field_of(value: Any) -> tuple[str, str]:
    """The type and the default of a config entry."""
    if isinstance(value, dict):
        return "dict[str, Any]", "field(default_factory=dict)"
    if isinstance(value, list):
        return f"list[{_item_type(value)}]", "field(default_factory=list)"
    kind = type(value).__name__
    return (kind, f'"{value}"') if isinstance(value, str) else (kind, repr(value))


def _item_type(values: list[Any]) -> str:
    shown = [value for value in values if value != []]
    inner = {field_of(value)[0] for value in shown}
    return " | ".join([*sorted(inner - {"NoneType"}), *(["None"] if "NoneType" in inner else [])])
