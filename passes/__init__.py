"""Passes: one file (or folder) per recipe key; the file name is the key.

``gqa_to_mla/`` defines ``class GqaToMla(Pass)`` and is the recipe key ``gqa-to-mla``. There is nothing to
register. Other packages add passes through the entry point group ``compress_model.passes``.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from typing import Any

ENTRY_POINTS = "compress_model.passes"


def pass_names() -> list[str]:
    """The recipe key of every pass, sorted. Imports none of them."""
    return sorted({*_files(), *_entry_points()})


def pass_class(key: str) -> Any:
    """The Pass class of a recipe key. Raises KeyError for an unknown key and lets import errors through."""
    if key in _files():
        module = importlib.import_module(f"{__name__}.{key.replace('-', '_')}")
        return getattr(module, _class_name(key))
    return _entry_points()[key].load()


def __getattr__(name: str) -> Any:
    for key in pass_names():
        if _class_name(key) == name:
            return pass_class(key)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _files() -> list[str]:
    return [module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)]


def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _class_name(key: str) -> str:
    return "".join(part.capitalize() for part in key.split("-"))
