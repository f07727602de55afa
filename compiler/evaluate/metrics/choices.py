"""choices: multiple choice by log-likelihood, on items of the user's own."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from compiler.evaluate.estimates import Array
from compiler.evaluate.inputs import position_limit
from compiler.evaluate.items import Item, read_items, refuse
from compiler.evaluate.metrics.base import Given, Task, share
from compiler.evaluate.metrics.needle import encoded
from compiler.evaluate.reader import Reader

FIELDS: Mapping[str, Any] = {"question": str, "choices": list, "answer": int | str}


@dataclass(frozen=True)
class Question:
    """``answer`` is the place of the right one among ``choices``."""

    text: str
    choices: tuple[str, ...]
    answer: int
    where: str = ""


@dataclass(frozen=True)
class Answered:
    """Log-probabilities in nats of each choice, their UTF-8 bytes, and the place of the right one."""

    nats: Sequence[float]
    sizes: Sequence[int]
    right: int

    @property
    def chosen(self) -> int:
        return int(np.argmax(self.nats))

    @property
    def chosen_by_byte(self) -> int:
        return int(np.argmax(np.array(self.nats) / np.array(self.sizes)))

    @property
    def confidence(self) -> float:
        """Log-probability of the right choice among the choices, nats."""
        return float(self.nats[self.right] - np.logaddexp.reduce(self.nats))


def questions(given: Given) -> Iterator[Question]:
    """The items of the evaluation. ``answer`` may be a place, counted from 0, a letter, or the right choice itself."""
    for item, where in read_items(given.items, FIELDS, "choices"):
        choices: list[Any] = item["choices"]
        if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
            refuse("`choices` are not two texts or more", where, "give each as a text that is not empty")
        yield Question(item["question"], tuple(choices), _place(item, choices, where), where)


def _place(item: Item, choices: Sequence[str], where: str) -> int:
    answer = item["answer"]
    if isinstance(answer, str):
        answer = choices.index(answer) if answer in choices else _letter(answer)
    if not 0 <= answer < len(choices):
        refuse(f"`answer` names none of the {len(choices)} choices", where, "give its place from 0, or its letter")
    return int(answer)


def _letter(answer: str) -> int:
    """The place that a letter stands for; -1 of all else."""
    return string.ascii_uppercase.find(answer.upper()) if len(answer.upper()) == 1 else -1


def answered(model: Any, tokenizer: Any, question: Question) -> Answered:
    """The log-probabilities of each choice after ``question``, which is read once. Raises DataError when too long."""
    prompt = torch.tensor(tokenizer(f"Question: {question.text}\nAnswer:").input_ids)
    choices = [encoded(tokenizer, f" {choice}") for choice in question.choices]
    limit = position_limit(model)
    if limit and len(prompt) + max(map(len, choices)) > limit:
        refuse(f"is longer than the {limit} tokens that the model takes", question.where, "leave it out")
    reader = Reader(model)
    reader.read_up_to(prompt[:-1])
    nats = [reader.branch().likelihood(torch.cat([prompt[-1:], choice]))[0] for choice in choices]
    return Answered(nats, [len(choice.encode()) for choice in question.choices], question.answer)


def _observe(model: Any, given: Given) -> list[Answered]:
    return [answered(model, given.tokenizer, question) for question in questions(given)]


def _score(ours: Sequence[Answered], theirs: Sequence[Answered] | None) -> Mapping[str, Array]:
    found = {
        "accuracy": share([one.chosen == one.right for one in ours]),
        "accuracy by byte": share([one.chosen_by_byte == one.right for one in ours]),
        "log-probability of the right one": share([one.confidence for one in ours]),
    }
    if theirs is not None:
        found["chosen as the original"] = share([a.chosen == b.chosen for a, b in zip(ours, theirs, strict=True)])
    return found


CHOICES = Task(_observe, _score, "causal", "items")
