"""Every metric by name, and which of them fit a model and its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compiler.errors import DataError, nearest
from compiler.evaluate.metrics.base import Metric, Task
from compiler.evaluate.metrics.calibration import CALIBRATION_ERROR
from compiler.evaluate.metrics.choices import CHOICES
from compiler.evaluate.metrics.conversation import CONVERSATION
from compiler.evaluate.metrics.divergence import AGREEMENT, AGREEMENT_BY_POSITION, KL, KL_BY_POSITION
from compiler.evaluate.metrics.features import NEAREST, PROBE
from compiler.evaluate.metrics.generation import GENERATION
from compiler.evaluate.metrics.likelihood import BITS_PER_BYTE, PERPLEXITY
from compiler.evaluate.metrics.needle import NEEDLE
from compiler.evaluate.metrics.outputs import COSINE, RELATIVE_ERROR
from compiler.evaluate.metrics.position import PERPLEXITY_BY_POSITION
from compiler.evaluate.metrics.similarity import RATINGS, SIMILARITY
from compiler.evaluate.metrics.words import WORD_ERRORS

METRICS: dict[str, Metric | Task] = {
    "perplexity": PERPLEXITY,
    "bits-per-byte": BITS_PER_BYTE,
    "calibration-error": CALIBRATION_ERROR,
    "kl": KL,
    "agreement": AGREEMENT,
    "perplexity-by-position": PERPLEXITY_BY_POSITION,
    "kl-by-position": KL_BY_POSITION,
    "agreement-by-position": AGREEMENT_BY_POSITION,
    "generation": GENERATION,
    "needle": NEEDLE,
    "conversation": CONVERSATION,
    "choices": CHOICES,
    "cosine": COSINE,
    "relative-error": RELATIVE_ERROR,
    "similarity": SIMILARITY,
    "ratings": RATINGS,
    "neighbours": NEAREST,
    "probe": PROBE,
    "word-errors": WORD_ERRORS,
}

MODELS = {
    "causal": "causal language models",
    "tokens": "causal language models on a text and of encoder-decoders on a text or on speech",
    "encoder": "encoders of texts",
    "images": "models of pictures on labelled pictures",
    "speech": "models of speech on recordings",
}


@dataclass(frozen=True)
class Situation:
    """What decides which metrics fit: the class of the model, for messages, what it takes and gives, and the data.

    ``takes`` and ``data`` are kinds of data, what it takes and what it is given ("": nothing), ``items`` whether there
    are any; the model is ``compared`` with a reference.
    """

    model: str
    takes: str
    causal: bool
    paired: bool
    generates: bool
    compared: bool
    data: str
    items: bool


def check_names(names: Sequence[str]) -> None:
    """Raises DataError when a name is no metric's."""
    for name in names:
        if name not in METRICS:
            raise DataError(f"there is no metric `{name}`", remedy=nearest(name, METRICS))


def choose(names: Sequence[str] | None, found: Situation) -> list[str]:
    """``names``, or those that fit. Raises DataError when one of ``names`` does not apply."""
    if names is None:
        fit = ["perplexity", "bits-per-byte", "kl", "agreement"] if found.generates else ["cosine", "relative-error"]
        return [n for n in fit if (found.compared if METRICS[n].compares else _fits(METRICS[n], found))]
    for name in names:
        metric = METRICS[name]
        if metric.compares and not found.compared:
            raise DataError(f"`{name}` compares two models", remedy="name the model to compare with")
        if not _fits(metric, found):
            text = " on a text" if metric.needs in ("text", "windows") and metric.of != "tokens" else ""
            raise DataError(
                f"`{name}` is of {MODELS[metric.of]}{text}; this is a {found.model}{_without(found)}",
                remedy="without `metrics` those that fit are measured",
            )
        if metric.needs == "items" and not found.items:
            raise DataError(f"`{name}` needs items", remedy="give `items`, a file of questions or texts to compare")
    return list(dict.fromkeys(names))


def _without(found: Situation) -> str:
    return f" on {found.data}" if found.data else " without data"


def _fits(metric: Metric | Task, found: Situation) -> bool:
    ready = metric.needs == "items" or found.data == "text"
    takes = {
        "causal": found.causal and ready,
        "tokens": (found.causal or found.paired) and bool(found.data),
        "encoder": found.takes == "text" and not found.generates and ready,
        "images": found.takes == "pictures" and found.data == "pictures",
        "speech": found.takes == "speech" and (found.data == "speech" or found.items),
    }
    return takes.get(metric.of, True)


def alone(names: Sequence[str]) -> list[str]:
    """Those of ``names`` that need no reference."""
    return [name for name in names if not METRICS[name].compares]
