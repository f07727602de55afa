"""generation: how soon greedy answers part from the original's, and how much they repeat themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compiler.evaluate.decode import greedy
from compiler.evaluate.estimates import Array
from compiler.evaluate.inputs import position_limit
from compiler.evaluate.metrics.base import Given, Task

PROMPT, ANSWER, GRAM = 64, 64, 4


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first that differs; all of them when none does."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((place for place, (one, other) in pairs if one != other), len(theirs))


def repetition(tokens: Sequence[int]) -> tuple[float, float]:
    """How many runs of four tokens have occurred before, and how many there are."""
    grams = [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]
    return float(len(grams) - len(set(grams))), float(len(grams))


def _observe(model: Any, given: Given) -> list[list[int]]:
    """The 64 greedy tokens after the first 64 tokens of each window, or what of that fits; no token ends them."""
    limit = position_limit(model) or PROMPT + ANSWER
    prompt = min(PROMPT, limit // 2)
    count = min(ANSWER, limit - prompt)
    prompts = (window.ids[None, :prompt] for window in given.windows if window.ids is not None)
    return [list(greedy(model, ids, count, stop=False)) for ids in prompts]


def _score(ours: Sequence[list[int]], theirs: Sequence[list[int]] | None) -> Mapping[str, Array]:
    found = {"repetition": np.array([repetition(tokens) for tokens in ours])}
    if theirs is not None:
        pairs = zip(ours, theirs, strict=True)
        found["first differing token"] = np.array([(first_difference(*pair), 1.0) for pair in pairs])
    return found


GENERATION = Task(_observe, _score, "causal", "text")
