"""Numbers measured over items (windows, questions, recordings), with bootstrap intervals, and what noise may make.

Every metric gives each item a row of numbers, mostly sums, and one number of all rows: a statistic. A bootstrap draws
items with replacement, so a draw is a weight for each item, and for statistics of sums a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

RESAMPLES = 2000
FEWEST = 6  # of fewer items even a difference of one sign in all has a chance of more than 5 % by luck
TAILS = (0.025, 0.975)

Array = np.ndarray[Any, np.dtype[np.float64]]
Statistic = Callable[[Array, Array], Array]  # rows [items, numbers] and weights [draws, items] give [draws]
Noise = Literal["within", "beyond", "unknown"]


@dataclass(frozen=True)
class Estimate:
    """A number measured over all items, with the 95 % interval that a bootstrap over items gives."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """A number of one model less that of another on the same items, with the 95 % interval of a paired bootstrap.

    ``noise``: the interval holds zero (``within``) or not (``beyond``); ``unknown`` of fewer than six items, and
    where one of the three is no number.
    """

    value: float
    low: float
    high: float
    noise: Noise


def ratio(finish: Callable[[Array], Array] = lambda value: value) -> Statistic:
    """The sum of the first numbers of a row over that of the second, and what ``finish`` makes of it."""

    def statistic(rows: Array, weights: Array) -> Array:
        over, under = (weights @ rows).T
        with np.errstate(divide="ignore", invalid="ignore"):
            return finish(over / under)

    return statistic


def estimate(rows: Array, statistic: Statistic, seed: int) -> Estimate:
    """The statistic of ``rows`` [items, numbers] and its 95 % interval: quantiles over 2000 draws of the items."""
    value = statistic(rows, np.ones((1, len(rows))))
    low, high = _interval(statistic(rows, draws(len(rows), seed)))
    return Estimate(float(value[0]), low, high)


def change(ours: Array, theirs: Array, statistic: Statistic, seed: int) -> Change:
    """How far the statistic of ``ours`` lies above that of ``theirs``, rows of the same items, drawn together."""
    whole, weights = np.ones((1, len(ours))), draws(len(ours), seed)
    value = statistic(ours, whole) - statistic(theirs, whole)
    low, high = _interval(statistic(ours, weights) - statistic(theirs, weights))
    known = len(ours) >= FEWEST and not np.isnan([value[0], low, high]).any()
    noise: Noise = "within" if low <= 0 <= high else "beyond"
    return Change(float(value[0]), low, high, noise if known else "unknown")


def draws(items: int, seed: int) -> Array:
    """How often each of so many items is drawn, [2000, items]: the same for the same seed."""
    picks = np.random.default_rng(seed).integers(items, size=(RESAMPLES, items))
    flat = picks + items * np.arange(RESAMPLES)[:, None]
    return np.bincount(flat.ravel(), minlength=RESAMPLES * items).reshape(RESAMPLES, items).astype(np.float64)


def _interval(values: Array) -> tuple[float, float]:
    """The 95 % interval of what was drawn; a draw without anything to count has no number, and does not count."""
    numbers = values[~np.isnan(values)]
    low, high = np.quantile(numbers, TAILS) if len(numbers) else (np.nan, np.nan)
    return float(low), float(high)
