"""Tokens per second of two models, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from compiler.errors import UsageError
from compiler.evaluate.decode import timed
from compiler.evaluate.inputs import is_causal
from compiler.evaluate.loading import load_model


@dataclass(frozen=True)
class Speed:
    """Tokens per second of two models, timed in turns; only their ratio means anything beyond this machine."""

    prefill: float
    decode: float
    reference_prefill: float
    reference_decode: float


def compare_speed(
    path: str | Path,
    against: str | Path,
    *,
    length: int = 256,
    new_tokens: int = 32,
    rounds: int = 3,
    trust_remote_code: bool = False,
) -> Speed:
    """Tokens per second of reading ``length`` random tokens and of writing ``new_tokens`` more, medians over rounds.

    Both models are in memory and take turns, after one round that does not count.
    """
    ours, theirs = speeds(
        (path, against), length=length, new_tokens=new_tokens, rounds=rounds, trust_remote_code=trust_remote_code
    )
    return Speed(*ours, *theirs)


def speeds(
    paths: Sequence[str | Path],
    *,
    length: int = 256,
    new_tokens: int = 32,
    rounds: int = 3,
    trust_remote_code: bool = False,
) -> list[tuple[float, float]]:
    """Of each model the tokens per second of reading, and of writing; all are in memory and take turns.

    Raises UsageError for a model that continues no sequence of tokens.
    """
    models = [load_model(each, trust_remote_code=trust_remote_code) for each in paths]
    for model in models:
        if not is_causal(model):
            cause = f"a {type(model).__name__} does not continue a text, and has no speed in tokens"
            raise UsageError(cause, remedy="leave `--speed` out")
    timings = [[timed(model, length, new_tokens) for model in models] for _ in range(rounds + 1)][1:]
    return [
        (length / median(turn[which][0] for turn in timings), new_tokens / median(turn[which][1] for turn in timings))
        for which in range(len(models))
    ]
