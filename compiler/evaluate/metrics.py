"""Metrics over windows: each is a ratio of sums, so that windows add up and a bootstrap over them is cheap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compiler.errors import DataError

ROWS = 64  # positions whose distributions are held in float64 at once
RESAMPLES = 2000

Scope = Literal["causal", "tokens", "logits", "any"]


@dataclass(frozen=True)
class Estimate:
    """A number measured over all windows, with the 95 % interval that a bootstrap over windows gives."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scored:
    """One window as metrics see it: token ids int64 [positions] (None when the model takes no tokens), the UTF-8
    bytes of the text that tokens 1.. stand for, and float outputs [positions, width] of the model and the reference.
    """

    output: Tensor
    reference: Tensor | None
    ids: Tensor | None = None
    text_bytes: int = 0


@dataclass(frozen=True)
class Metric:
    """``score`` gives a window's numerator and denominator; ``finish`` turns the ratio of their sums into the number.

    ``of`` says which models it applies to: causal language models, those and encoder-decoders, which write tokens too,
    models with logits, any. ``compares`` says
    whether it needs a reference.
    """

    score: Callable[[Scored], tuple[float, float]]
    of: Scope
    compares: bool = True
    finish: Callable[[Any], Any] = lambda ratio: ratio


@dataclass
class Sums:
    """The numerators and denominators of a metric, one of each per window."""

    over: list[float] = field(default_factory=list[float])
    under: list[float] = field(default_factory=list[float])

    def add(self, over: float, under: float) -> None:
        self.over.append(over)
        self.under.append(under)

    def estimate(self, metric: Metric, seed: int) -> Estimate:
        over, under = np.array(self.over), np.array(self.under)
        picks = np.random.default_rng(seed).integers(len(over), size=(RESAMPLES, len(over)))
        low, high = np.quantile(metric.finish(over[picks].sum(1) / under[picks].sum(1)), [0.025, 0.975])
        return Estimate(float(metric.finish(over.sum() / under.sum())), float(low), float(high))


def nats(window: Scored) -> tuple[float, float]:
    """Cross entropy of tokens 1.. given those before; the first token of a window is not scored."""
    if window.ids is None:
        raise ValueError("only token windows have a cross entropy")
    targets = window.ids[1:]
    losses = torch.nn.functional.cross_entropy(window.output[:-1].float(), targets, reduction="none")
    return losses.double().sum().item(), float(len(targets))


def bits(window: Scored) -> tuple[float, float]:
    """The same in bits, per byte of text."""
    return nats(window)[0] / math.log(2), float(window.text_bytes)


def divergence(window: Scored) -> tuple[float, float]:
    """KL(reference || model) of the next-token distributions, in nats, exact over the whole vocabulary."""
    total = 0.0
    for ours, theirs in zip(window.output.split(ROWS), _reference(window).split(ROWS), strict=True):
        log_p, log_q = torch.log_softmax(theirs.double(), -1), torch.log_softmax(ours.double(), -1)
        terms = log_p.exp() * (log_p - log_q)
        total += terms.masked_fill(log_p == -math.inf, 0).sum().item()  # what has no probability adds nothing
    return total, float(len(window.output))


def agreement(window: Scored) -> tuple[float, float]:
    """Positions at which the most likely token is the same."""
    same = window.output.argmax(-1) == _reference(window).argmax(-1)
    return float(same.sum().item()), float(len(same))


def cosine(window: Scored) -> tuple[float, float]:
    """Cosine similarity of the outputs at each position."""
    cosines = torch.nn.functional.cosine_similarity(window.output.double(), _reference(window).double(), dim=-1)
    return cosines.sum().item(), float(len(cosines))


def squared_error(window: Scored) -> tuple[float, float]:
    """Squared Frobenius norm of the difference, over that of the reference."""
    reference = _reference(window).double()
    return (window.output.double() - reference).square().sum().item(), reference.square().sum().item()


def _reference(window: Scored) -> Tensor:
    if window.reference is None:
        raise ValueError("this metric compares with a reference")
    return window.reference


METRICS: dict[str, Metric] = {
    "perplexity": Metric(nats, "tokens", compares=False, finish=np.exp),
    "bits-per-byte": Metric(bits, "causal", compares=False),
    "kl": Metric(divergence, "logits"),
    "agreement": Metric(agreement, "logits"),
    "cosine": Metric(cosine, "any"),
    "relative-error": Metric(squared_error, "any", finish=np.sqrt),
}


WRITERS = {
    "causal": "causal language models on a text",
    "tokens": "causal language models on a text and of encoder-decoders on a text or on speech",
}


def check_names(names: Sequence[str]) -> None:
    """Raises DataError when a name is no metric's."""
    for name in names:
        if name not in METRICS:
            raise DataError(f"there is no metric `{name}`", remedy=f"there are: {', '.join(METRICS)}")


def choose(
    names: Sequence[str] | None, model: str, *, causal: bool, paired: bool, generates: bool, compared: bool, texts: bool
) -> list[str]:
    """``names``, or those that fit. Raises DataError when one of ``names`` does not apply.

    ``model`` is the model's class, for messages; it is a ``causal`` language model or an encoder and a decoder that are
    ``paired``; it ``generates`` tokens; it is ``compared`` with a reference; its inputs are ``texts`` (or speech).
    """
    scored = {"causal": causal and texts, "tokens": (causal or paired) and texts}
    if names is None:
        fit = ["perplexity", "bits-per-byte", "kl", "agreement"] if generates else ["cosine", "relative-error"]
        return [n for n in fit if (compared if METRICS[n].compares else scored.get(METRICS[n].of, True))]
    for name in names:
        if METRICS[name].compares and not compared:
            raise DataError(f"`{name}` compares two models", remedy="name the model to compare with")
        if not scored.get(METRICS[name].of, True):
            raise DataError(f"`{name}` is of {WRITERS[METRICS[name].of]}; this is a {model}")
    return list(names)


def alone(names: Sequence[str]) -> list[str]:
    """Those of ``names`` that need no reference."""
    return [name for name in names if not METRICS[name].compares]
