"""conversation: several questions about one text, turn by turn, over a cache that holds the shared beginning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compiler.evaluate.estimates import Array
from compiler.evaluate.metrics.base import Given, Row, Task, stacked
from compiler.evaluate.metrics.needle import FACTS, MARGIN, Fact, asked, check_room, encoded, hidden
from compiler.evaluate.reader import Reader

TURNS = 3


def turn_by_turn(model: Any, tokenizer: Any, filler: Tensor, facts: Sequence[Fact], length: int) -> list[Row]:
    """Log-probability (nats) of the right answer in each turn, and whether greedy decoding gives it.

    A text of about ``length`` tokens holds all facts; each turn asks for one, and the right answers are what the model
    is said to have given. What a turn has in common with those before it stays in the cache and is not read again.
    Raises DataError when ``length`` leaves no room for a text.
    """
    told = " ".join(f"{fact.sentence} {fact.question} {fact.start}{fact.answer}" for fact in facts)
    room = length - len(tokenizer(told).input_ids) - MARGIN * len(facts)
    check_room(room, length)
    story = tokenizer.decode(filler[:room], skip_special_tokens=True)
    for index, fact in enumerate(facts):
        story = hidden(story, fact, (index + 0.5) / len(facts))
    reader, found, turns = Reader(model), list[Row](), [("user", f"{story}\n\n{facts[0].question}")]
    for fact, following in zip(facts, [*facts[1:], None], strict=True):
        prompt = asked(tokenizer, turns, fact.start)
        reader.read_up_to(prompt[:-1])
        found.append(reader.likelihood(torch.cat([prompt[-1:], encoded(tokenizer, fact.answer)])))
        turns.append(("assistant", f"{fact.start}{fact.answer}."))
        if following is not None:
            turns.append(("user", following.question))
    return found


def _observe(model: Any, given: Given) -> list[Mapping[str, Row]]:
    windows = [window.ids for window in given.windows if window.ids is not None]
    return [_parts(model, given, ids, index) for index, ids in enumerate(windows)]


def _parts(model: Any, given: Given, filler: Tensor, index: int) -> Mapping[str, Row]:
    facts = [FACTS[(index + turn) % len(FACTS)] for turn in range(TURNS)]
    found: dict[str, Row] = {}
    for turn, (log_probability, greedy) in enumerate(
        turn_by_turn(model, given.tokenizer, filler, facts, given.length), 1
    ):
        found[f"turn {turn}, log-probability"] = (log_probability, 1.0)
        found[f"turn {turn}, found"] = (float(greedy), 1.0)
    return found


def _score(ours: Sequence[Any], theirs: Sequence[Any] | None) -> Mapping[str, Array]:
    return stacked(ours)


CONVERSATION = Task(_observe, _score, "causal", "text")
