"""needle: one sentence with a fact, at several depths of a text it does not belong to, then a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiler.errors import DataError
from compiler.evaluate.estimates import Array
from compiler.evaluate.metrics.base import Given, Row, Task, stacked
from compiler.evaluate.reader import Reader

DEPTHS = (0.1, 0.5, 0.9)
MARGIN = 48  # tokens that a chat template may add
SHORTEST = 64


@dataclass(frozen=True)
class Fact:
    """A sentence to hide, what is asked about it, and the start of the answer, which ``answer`` completes."""

    sentence: str
    question: str
    start: str
    answer: str


# SmolLM2-135M answers these out of a short text, so that a loss shows.
FACTS = (
    Fact(
        "The best thing to do in Oslo is to ride the yellow tram at midnight.",
        "What is the best thing to do in Oslo?",
        "The best thing to do in Oslo is to ride the",
        " yellow tram at midnight",
    ),
    Fact(
        "The museum in Lima was built by the engineer Tobias Hartmann.",
        "Who built the museum in Lima?",
        "The museum in Lima was built by the engineer",
        " Tobias Hartmann",
    ),
    Fact(
        "The name of the ship is the Silver Heron.",
        "What is the name of the ship?",
        "The name of the ship is the",
        " Silver Heron",
    ),
    Fact(
        "The pilot Alma Reyes was born in the city of Montevideo.",
        "In which city was the pilot Alma Reyes born?",
        "The pilot Alma Reyes was born in the city of",
        " Montevideo",
    ),
)


def answered(model: Any, tokenizer: Any, filler: Tensor, fact: Fact, length: int, depth: float) -> tuple[float, bool]:
    """Log-probability (nats) of the answer after a prompt of about ``length`` tokens, and whether greedy gives it."""
    prompt = haystack(tokenizer, filler, fact, length, depth)
    reader = Reader(model)
    reader.read_up_to(prompt[:-1])
    return reader.likelihood(torch.cat([prompt[-1:], encoded(tokenizer, fact.answer)]))


def haystack(tokenizer: Any, filler: Tensor, fact: Fact, length: int, depth: float) -> Tensor:
    """Filler with the fact after the sentence at ``depth`` of it, the question, and the start of the answer.

    Raises DataError when ``length`` leaves no room for a text.
    """
    room = length - len(tokenizer(f"{fact.sentence} {fact.question} {fact.start}").input_ids) - MARGIN
    check_room(room, length)
    story = hidden(tokenizer.decode(filler[:room], skip_special_tokens=True), fact, depth)
    return asked(tokenizer, [("user", f"{story}\n\n{fact.question}")], fact.start)


def check_room(room: int, length: int) -> None:
    """Raises DataError when ``room`` tokens of a text are too few to hide something in."""
    if room < SHORTEST:
        raise DataError(f"windows of {length} tokens leave no room for a text", remedy="give a `length` of 256 or more")


def hidden(text: str, fact: Fact, depth: float) -> str:
    """``text`` with the sentence of ``fact`` after the one at ``depth`` of it."""
    place = text.find(". ", int(depth * len(text))) + 1
    return f"{text[:place]} {fact.sentence}{text[place:]}" if place else f"{text} {fact.sentence}"


def asked(tokenizer: Any, turns: Sequence[tuple[str, str]], start: str) -> Tensor:
    """Token ids [tokens] of ``turns``, (who, what) each, in the chat template if there is one, and then ``start``."""
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": who, "content": what} for who, what in turns]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return encoded(tokenizer, text + start)
    texts = [what for _, what in turns]
    return torch.tensor(tokenizer("\n".join([*texts, start])).input_ids)


def encoded(tokenizer: Any, text: str) -> Tensor:
    """Token ids [tokens] of ``text`` alone."""
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def _observe(model: Any, given: Given) -> list[Mapping[str, Row]]:
    """Each window hides one of the facts in turn, at each depth."""
    return [
        _at_depths(model, given, window.ids, FACTS[index % len(FACTS)])
        for index, window in enumerate(given.windows)
        if window.ids is not None
    ]


def _at_depths(model: Any, given: Given, filler: Tensor, fact: Fact) -> Mapping[str, Row]:
    found: dict[str, Row] = {}
    for depth in DEPTHS:
        log_probability, greedy = answered(model, given.tokenizer, filler, fact, given.length, depth)
        found[f"at {depth:.0%}, log-probability"] = (log_probability, 1.0)
        found[f"at {depth:.0%}, found"] = (float(greedy), 1.0)
    return found


def _score(ours: Sequence[Any], theirs: Sequence[Any] | None) -> Mapping[str, Array]:
    return stacked(ours)


NEEDLE = Task(_observe, _score, "causal", "text")
