"""Generated modules of models that go on with fewer tokens compute what their graphs compute."""

from __future__ import annotations

import pytest
import torch

from compiler.errors import TargetError
from compiler.evaluate import load_model
from compiler.ir.execute import run
from compiler.ir.stages import after_prompt
from compiler.target import emission_of
from tests.emitted import written_for
from tests.families import FAMILIES
from tests.test_drop_tokens import dropped
from tests.test_generated import GOLDEN, error, generated, tolerance, written

CHOICES = {
    "dropped": {"score": "class"},
    "behind layers": {"score": "received", "site": "layer"},
    "by keys": {"score": "key-norm", "layers": "1"},
    "in blocks": {"score": "class", "block": 3},
    "merged": {"merge": "bipartite"},
    "extra": {"merge": "extra", "score": "class"},
    "neighbours": {"merge": "average"},
    "merged once": {"merge": "bipartite", "layers": "0"},
    "before a layer": {"score": "random", "layers": "0", "site": "entry"},
}


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
def test_pictures_of_fewer_tokens(options, tmp_path):
    graph, reduced = dropped("dinov2", depth=3, keep=0.6, **options)
    model, given = written(reduced, tmp_path / "out"), FAMILIES["dinov2"].inputs(batch=2)
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        found, same = model(**given), again(**given)
    for output, value in run(reduced, given).items():
        assert error(found[output], value) <= tolerance(graph)
        assert torch.equal(found[output], same[output])


def test_texts_that_may_be_padded_are_refused():
    _, reduced = dropped("bert", keep=0.6, layers="0")
    with pytest.raises(TargetError, match="that may be padded"):
        emission_of(reduced, "generated")


PROMPT, LATER = 9, 5


def decoded(graph, ids, count=LATER):
    """Greedy tokens after the prompt ``ids`` by whole forwards of the graph."""
    for _ in range(count):
        logits = run(after_prompt(graph, PROMPT), {"input_ids": ids})["logits"]
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids


PROMPTS = {
    "last": {"score": "last"},
    "received": {"score": "received", "every": 2},
    "in blocks": {"score": "last", "block": 2},
    "by chance": {"score": "random"},
    "behind layers": {"score": "last", "site": "layer"},
    "renumbered": {"score": "last", "positions": "renumber"},
    "by numbers": {"score": "last", "keep": (6, 3)},
}


def check_prompts(name, options, directory):
    graph, reduced = dropped(name, depth=4, **{"keep": (0.7, 0.4), "layers": "0,2", **options})
    ids = FAMILIES[name].inputs(batch=2, tokens=PROMPT)["input_ids"]
    model = written(reduced, directory / "out")
    with torch.no_grad():
        assert error(model(input_ids=ids).logits, run(reduced, {"input_ids": ids})["logits"]) <= tolerance(graph)
    assert torch.equal(generated(model, ids)[:, : PROMPT + LATER], decoded(reduced, ids))
    mask, short = torch.ones_like(ids), ids.clone()
    mask[1, :4], short[1, :4] = 0, 0
    found = generated(model, short, attention_mask=mask)
    assert torch.equal(found[1:, PROMPT:], generated(model, ids[1:, 4:])[:, PROMPT - 4 :])
    assert torch.equal(found[:1], generated(model, ids[:1]))


@pytest.mark.parametrize("options", PROMPTS.values(), ids=PROMPTS)
def test_prompts_of_fewer_tokens(options, tmp_path):
    check_prompts("llama", options, tmp_path)


def test_caches_are_not_rounded():
    _, reduced = dropped("llama", keep=0.6, layers="0")
    with pytest.raises(TargetError, match="is not rounded"):
        emission_of(reduced, "generated", cache_bits=8)


def test_the_code_can_be_read(tmp_path, golden):
    _, reduced = dropped("llama", depth=4, keep=(0.7, 0.4), layers="0,2", score="last")
    for file, text in written_for(emission_of(reduced, "generated")).items():
        golden(GOLDEN / "fewer_tokens" / file, text)


@pytest.mark.parametrize("name", ["mistral", "gpt2", "mixtral"])
def test_prompts_of_fewer_tokens_in_other_families(name, tmp_path):
    check_prompts(name, {"score": "last"}, tmp_path)
