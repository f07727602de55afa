"""Options of `prune` that contradict each other, or that would have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from compiler.errors import PassError

if TYPE_CHECKING:
    from passes.prune import Prune

DEPTH = frozenset({"layers", "sublayers"})
FEW = DEPTH | {"groups", "heads", "experts"}
FOR_SPEED = ("runtime", "batch", "tokens", "threads", "latency")
BY_COLUMN = ("activation", "fluctuation", "taylor")

Conflict = tuple[bool, str, str, str]
"""Whether it is there, the option at fault, the cause, and the remedy."""


def check(wanted: Prune) -> None:
    """Raises PassError for the first conflict of ``wanted``."""
    for conflicts in (_of_what, _of_how_much, _of_speed, _of_scores):
        for found, option, cause, remedy in conflicts(wanted):
            if found:
                raise PassError(cause, option=option, remedy=remedy)


def _of_what(wanted: Prune) -> Iterator[Conflict]:
    kinds = set(wanted.kinds)
    yield not kinds, "what", "`what` names nothing to prune", "leave it out for channels"
    yield kinds >= DEPTH, "what", "sublayers are parts of layers", "name one of them"
    both = "hidden" in kinds and bool(kinds & DEPTH)
    yield both, "what", "layers hold parts of the residual stream", "prune them one after the other, in two passes"
    more = "vocabulary" in kinds and len(kinds) > 1
    yield more, "what", "tokens go by how often they occur, and not by what they cost", "prune them in a last pass"
    by_cost = "vocabulary" in kinds and (wanted.faster != 1 or wanted.score != "loss" or wanted.sizes != "uniform")
    yield by_cost, "what", "tokens go by how often they occur", "leave `faster`, `score` and `sizes` out"
    remedy = "write `what: hidden`, or leave it out"
    yield wanted.rotate and "hidden" not in kinds, "rotate", "only the residual stream is turned", remedy


def _of_how_much(wanted: Prune) -> Iterator[Conflict]:
    counted, several = wanted.keep > 1, len(wanted.kinds) > 1 or wanted.sizes == "by-layer"
    cause = "`keep` and `faster` both say how much goes"
    yield wanted.keep != 1 and wanted.faster != 1, "faster", cause, "leave one of them out"
    cause = "a number of what remains is the same for each place, and of one kind"
    yield counted and several, "keep", cause, "write a part, such as `keep: 80%`"
    whole = wanted.of == "model"
    yield counted and whole, "of", "a number says what remains of each place, not of the model", "leave `of` out"
    yield wanted.faster != 1 and whole, "of", "`faster` is of the whole model in any case", "leave `of` out"


def _of_speed(wanted: Prune) -> Iterator[Conflict]:
    defaults = {field.name: field.default for field in fields(wanted)}
    for name in FOR_SPEED:
        given = getattr(wanted, name) != defaults[name]
        yield given and wanted.faster == 1, name, f"`{name}` is for `faster` alone", "leave it out, or ask for a speed"


def _of_scores(wanted: Prune) -> Iterator[Conflict]:
    score, kinds = wanted.score, set(wanted.kinds)
    apart = "prune other dimensions in a pass of their own"
    yield score == "influence" and bool(kinds - DEPTH), "score", "only layers and sublayers have an influence", apart
    cause, few = "channels and widths are too many to leave out one by one", f"use it for {', '.join(sorted(FEW))}"
    yield score == "output" and bool(kinds - FEW), "score", cause, few
    cause = f"what layers cost does not compare with `score: {score}`"
    yield score in (*BY_COLUMN, "magnitude") and bool(kinds & DEPTH) and bool(kinds - DEPTH), "score", cause, apart
    cause = f"experts are not ranked by `{score}`"
    yield score in BY_COLUMN and "experts" in kinds, "score", cause, "use `loss`, `magnitude` or `output` for experts"
    cause = f"`score: {score}` does not compare between layers"
    yield wanted.sizes == "by-layer" and score != "loss", "sizes", cause, "leave `score` out, or `sizes`"
