"""similarity and ratings: whether an encoder of texts finds alike what the original, or people, find alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compiler.evaluate.estimates import Array
from compiler.evaluate.items import Item, read_items, refuse
from compiler.evaluate.metrics.base import Given, Task

AT_ONCE = 50  # draws whose pairs are weighed at once
FIELDS: Mapping[str, Any] = {"a": str, "b": str, "score": int | float}


def cosines(vectors: Sequence[Tensor]) -> Tensor:
    """Cosines of all pairs of ``vectors``, float64 [count, count]."""
    unit = functional.normalize(torch.stack(list(vectors)).double(), dim=-1)
    return unit @ unit.T


def pair_rows(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Array:
    """A row for each item: its cosines to all items by ``ours``, and then by ``theirs``."""
    return torch.cat([cosines(ours), cosines(theirs)], 1).numpy()


def pairs_correlation(rows: Array, weights: Array) -> Array:
    """Spearman's rank correlation over all pairs of items of what ``pair_rows`` gives, [draws].

    A pair weighs as often as both its items are drawn; an item drawn twice is no pair with itself. Ranks are those
    among all pairs.
    """
    one, other = np.triu_indices(len(rows), 1)
    ours, theirs = _ranks(rows[:, : len(rows)][one, other]), _ranks(rows[:, len(rows) :][one, other])
    parts = np.array_split(weights, max(1, len(weights) // AT_ONCE))
    return np.concatenate([_correlation(ours, theirs, part[:, one] * part[:, other]) for part in parts])


def column_correlation(rows: Array, weights: Array) -> Array:
    """Spearman's rank correlation between the two columns of ``rows`` [items, 2], [draws]."""
    return _correlation(_ranks(rows[:, 0]), _ranks(rows[:, 1]), weights)


def _correlation(x: Array, y: Array, weights: Array) -> Array:
    """Pearson's correlation of ``x`` and ``y`` [values] under each row of ``weights`` [draws, values]."""
    x, y = x - x.mean(), y - y.mean()
    total = weights.sum(1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    spread = (weights @ x**2 / total - mean_x**2) * (weights @ y**2 / total - mean_y**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (weights @ (x * y) / total - mean_x * mean_y) / np.sqrt(spread)


def mean_state(model: Any, ids: Tensor) -> Tensor:
    """The mean over tokens of the first output for ``ids`` [tokens], float32 [width]."""
    with torch.inference_mode():
        return model(input_ids=ids[None])[0][0].float().mean(0).clone()


def _ranks(values: Array) -> Array:
    """Ranks of ``values`` [n], the mean rank for equal ones. scipy.stats takes long to load, for this alone."""
    from scipy.stats import rankdata

    return rankdata(values)


def _windows(model: Any, given: Given) -> list[Tensor]:
    return [mean_state(model, window.ids) for window in given.windows if window.ids is not None]


def _alike(ours: Sequence[Tensor], theirs: Sequence[Tensor] | None) -> Mapping[str, Array]:
    return {} if theirs is None else {"": pair_rows(ours, theirs)}


def _rated(model: Any, given: Given) -> list[tuple[float, float]]:
    """The cosine of the two texts of each item, and the score that people gave it."""

    def state(text: str) -> Tensor:
        return mean_state(model, torch.tensor(given.tokenizer(text, truncation=True).input_ids))

    return [
        (functional.cosine_similarity(state(item["a"]), state(item["b"]), dim=0).item(), rating(item, where))
        for item, where in read_items(given.items, FIELDS, "ratings")
    ]


def rating(item: Item, where: str) -> float:
    """The score of an item. Raises DataError when a float64 cannot hold it, and when it is NaN or infinite."""
    try:
        score = float(item["score"])
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        refuse("`score` is no finite number", where, "give the score that people gave")
    return score


def _scores(ours: Sequence[tuple[float, float]], theirs: Any) -> Mapping[str, Array]:
    return {"": np.array(ours)}


SIMILARITY = Task(_windows, _alike, "encoder", "text", compares=True, statistic=pairs_correlation)
RATINGS = Task(_rated, _scores, "encoder", "items", statistic=column_correlation)
