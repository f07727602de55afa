"""Configs that claim more than any model has, refused before anything is made of them.

Classes of configs make lists and tables as long as such numbers say, before anybody asks how long that is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from compiler.errors import CheckpointError

LIMIT = 1_000_000
MODULES = 60_000
_COUNTS = re.compile(r"(^|_)(num|n)_|layer|depth|expert|head|stage|label|block|_count$")


def check_counts(values: Mapping[str, Any], where: Path | str) -> None:
    """Raises CheckpointError when ``values``, a config, counts more than ``LIMIT`` of anything."""
    for name, number in _numbers(values):
        if _COUNTS.search(name) and abs(number) > LIMIT:
            raise CheckpointError(
                f"`{name}` is {_short(number)}: no model has that many",
                where=str(where),
                remedy="the config is damaged: fetch it again",
            )


@contextmanager
def bounded_modules(where: Path | str) -> Generator[None]:
    """Raises CheckpointError when more modules are made than any model has: even without weights each takes memory."""
    made = itertools.count(1)

    def count(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if next(made) > MODULES:
            raise CheckpointError(
                f"the model of this config has more than {MODULES} parts",
                where=str(where),
                remedy="correct its numbers of layers and experts",
            )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a document with the key that it stands under."""
    if isinstance(value, Mapping):
        for key, inner in cast(Mapping[str, Any], value).items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in cast(list[Any], value):
            yield from _numbers(inner, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _short(number: float) -> str:
    text = str(number)
    return text if len(text) < 24 else f"a number of {len(text)} digits"
