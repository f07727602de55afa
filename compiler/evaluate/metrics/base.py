"""What a metric is: of which models, what it gives for each item, and the number that it makes of all items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from compiler.evaluate.estimates import Array, Statistic, ratio
from compiler.evaluate.inputs import Window

Scope = Literal["causal", "tokens", "logits", "any", "encoder", "images", "speech"]
Row = Sequence[float]
MEAN = ratio()
Needs = Literal["windows", "text", "items", "images", "speech"]


@dataclass(frozen=True)
class Scored:
    """One window as metrics see it: token ids int64 [positions] (None when the model takes no tokens), the UTF-8
    bytes of the text that tokens 1.. stand for, and float outputs [positions, width] of the model and the reference.
    """

    output: Tensor
    reference: Tensor | None
    ids: Tensor | None = None
    text_bytes: int = 0

    def original(self) -> Tensor:
        """The reference's outputs."""
        if self.reference is None:
            raise ValueError("this metric compares with a reference")
        return self.reference


@dataclass(frozen=True)
class Given:
    """What every model gets that is measured: ``windows``, what loads tokenizers and extractors, where items lie.

    ``samples`` and ``seed`` pick from what has more items than are asked for.
    """

    windows: Sequence[Window]
    path: str | Path
    data: Path | None = None
    items: Path | None = None
    samples: int = 16
    length: int = 512
    seed: int = 0
    tokenizer: Any = None
    image: int | None = None


@dataclass(frozen=True)
class Metric:
    """``score`` gives rows of one window, by part of the metric ("" when it has no parts); ``statistic`` the number.

    ``of`` says which models it applies to, ``compares`` whether it needs a reference.
    """

    score: Callable[[Scored], Mapping[str, Row]]
    of: Scope
    compares: bool = True
    statistic: Statistic = MEAN
    needs: Needs = "windows"


@dataclass(frozen=True)
class Task:
    """A metric that uses the model in a way of its own. ``observe`` gives what it made of each item, which is kept;
    ``score`` rows [items, numbers] of that, by part, and beside the reference's observations, where there are any.
    """

    observe: Callable[[Any, Given], list[Any]]
    score: Callable[[Sequence[Any], Sequence[Any] | None], Mapping[str, Array]]
    of: Scope
    needs: Needs
    compares: bool = False
    statistic: Statistic = MEAN


def share(flags: Sequence[bool] | Sequence[float]) -> Array:
    """Rows of a mean over items."""
    return np.array([(float(flag), 1.0) for flag in flags])


def stacked(rows: Sequence[Mapping[str, Row]]) -> dict[str, Array]:
    """Rows of each part over all items; an item that lacks a part counts nothing there."""
    parts = dict.fromkeys(part for row in rows for part in row)
    width = {part: len(next(row[part] for row in rows if part in row)) for part in parts}
    return {part: np.array([row.get(part, [0.0] * width[part]) for row in rows], np.float64) for part in parts}
