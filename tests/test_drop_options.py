"""Options of `drop-tokens` that nothing would read are refused, unless they are at their defaults."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import pytest

from compiler.errors import PassError
from passes.drop_tokens import DropTokens
from tests.test_drop_tokens import dropped

DEFAULTS = {field.name: field.default for field in fields(DropTokens)}
MERGES = ("none", "extra", "bipartite", "average", "words")
UNREAD = {"compare": "stream", "proportional": False, "every": 3, "seed": 5, "learn": 9, "of": "means"}
UNREAD |= {"block": 4, "crops": (1, 2)}
READ = {
    "compare": [{"merge": "bipartite"}, {"score": "similarity"}, {"merge": "bipartite", "skip": "mlp"}],
    "proportional": [
        {"merge": "bipartite"},
        {"merge": "average"},
        {"merge": "words"},
        {"merge": "bipartite", "score": "similarity"},
    ],
    "every": [{"score": "received"}, {}, {"merge": "extra", "score": "received"}],
    "seed": [{"score": "random"}, {"score": "random", "skip": "mlp"}, {"score": "learned"}],
    "learn": [{"score": "learned"}, {"merge": "words"}],
    "of": [{"score": "learned"}],
    "block": [{}, {"score": "key-norm"}, {"merge": "extra"}, {"skip": "mlp"}],
    "crops": [{"tokens": "pictures", "score": "class"}],
}
NOT_READ = {
    "compare": [{}, {"score": "received"}, {"merge": "average"}, {"merge": "extra"}],
    "proportional": [{}, {"score": "similarity"}, {"merge": "extra"}, {"merge": "bipartite", "skip": "mlp"}],
    "every": [{"score": "class"}, {"score": "last"}, {"merge": "bipartite"}, {"merge": "average"}],
    "seed": [{}, {"score": "recency"}, {"merge": "bipartite"}],
    "learn": [{}, {"score": "random"}, {"merge": "bipartite"}],
    "of": [{}, {"score": "received"}],
    "block": [{"merge": "bipartite"}, {"merge": "average"}, {"score": "similarity"}],
    "crops": [{}, {"score": "class"}, {"tokens": "pictures", "score": "last"}],
}


@pytest.mark.parametrize("option", UNREAD)
def test_an_option_that_nothing_reads_is_refused(option):
    for beside in READ[option]:
        assert getattr(DropTokens(keep=0.5, **beside, **{option: UNREAD[option]}), option) == UNREAD[option]
    for beside in NOT_READ[option]:
        with pytest.raises(PassError) as refused:
            DropTokens(keep=0.5, **beside, **{option: UNREAD[option]})
        assert refused.value.option == option and refused.value.remedy == f"leave out `{option}`"


def test_defaults_may_be_written_wherever_they_may_be_left_out():
    written = {option: DEFAULTS[option] for option in UNREAD}
    for score, merge in product((None, "received", "class", "random", "similarity"), MERGES):
        try:
            left_out = DropTokens(score=score, merge=merge)
        except PassError:
            continue
        assert DropTokens(score=score, merge=merge, **written) == left_out


def test_means_of_neighbours_have_no_score():
    for score in ("class", "received", "random", "similarity"):
        with pytest.raises(PassError, match="whatever the score") as refused:
            DropTokens(keep=0.5, merge="average", score=score)
        assert refused.value.option == "score" and refused.value.remedy


def test_every_so_many_queries_are_those_of_models_that_score_by_all():
    dropped("bert", keep=0.5, every=2)
    dropped("llama", keep=0.5, every=2, score="received")
    with pytest.raises(PassError, match="last token") as refused:
        dropped("llama", keep=0.5, every=2)
    assert refused.value.option == "every"
