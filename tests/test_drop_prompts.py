"""Prompts that lose tokens: what comes after them, from a cache, is as if the dropped ones were masked."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backends.onnx import emit, propose, verify
from backends.onnx.runner import Runner
from compiler.errors import TargetError
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.stages import after_prompt
from compiler.ir.types import TensorType
from tests.emitted import TOLERANCE
from tests.families import FAMILIES
from tests.test_drop_tokens import composed, dropped, observed
from tests.test_onnx import CAUSAL, Session, error, tolerance, written

WITH_KEYS = [name for name in CAUSAL if not name.startswith("deepseek")]
PROMPT, LATER = 9, 4


def tokens(name: str, batch: int = 2, count: int = PROMPT + LATER) -> Tensor:
    return FAMILIES[name].inputs(batch=batch, tokens=count)["input_ids"]


def one_shot(graph: Graph, reduced: Graph, ids: Tensor) -> Tensor:
    """The original's logits of all ``ids``, with the tokens of the prompt that ``reduced`` drops masked from there on:
    of what remains and of what comes after."""
    values, _ = observed(reduced, {"input_ids": ids[:, :PROMPT]})
    places = composed(reduced, values)
    step, given = 0, {"input_ids": ids}
    attentions = iter(graph.nodes_named("attention"))
    for node in reduced.nodes:
        step += node.op.name == "token_select"
        if node.op.name != "attention":
            continue
        whole = next(attentions)
        if step and node.input(1).shape != whole.input(1).shape:
            name = f"kept{step}"
            if name not in given:
                graph.add_input(name, TensorType(torch.bool, graph.inputs["input_ids"].shape))
                kept = torch.zeros(len(ids), PROMPT, dtype=torch.bool).scatter(1, places[step - 1], True)
                given[name] = torch.cat((kept, torch.ones(len(ids), ids.shape[1] - PROMPT, dtype=torch.bool)), 1)
            whole.inputs += [None] * (4 - len(whole.inputs))
            graph.set_input(whole, 3, graph.inputs[name])
    return run(graph, given)["logits"]


def decoded(model: Session, ids: Tensor, prompt: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits of the ``prompt`` [B, P] with its ``mask``, then of ``ids`` after it one by one."""
    found, past = model.step(prompt, mask)
    logits = [found]
    for place in range(ids.shape[1]):
        mask = F.pad(mask, (0, 1), value=1)
        found, past = model.step(ids[:, place : place + 1], mask, past)
        logits.append(found)
    return logits


@pytest.mark.parametrize("name", WITH_KEYS)
def test_what_comes_after_a_prompt_is_as_if_what_it_lost_were_masked(name, tmp_path):
    graph, reduced = dropped(name, depth=3, keep=(0.7, 0.4), layers="0-1", score="last")
    ids = tokens(name)
    whole = run(after_prompt(reduced, PROMPT), {"input_ids": ids})["logits"]
    model = written(reduced, tmp_path, "onnx" if name in ("gemma3", "gpt2") else "ort-cpu")
    found = torch.cat(decoded(model, ids[:, PROMPT:], ids[:, :PROMPT], torch.ones_like(ids[:, :PROMPT])), 1)
    assert error(found, whole) <= tolerance(graph)
    expected = one_shot(graph, reduced, ids)[:, PROMPT:]
    assert (whole[:, PROMPT:] - expected).abs().max() <= TOLERANCE * expected.abs().max()


CHOICES = {
    "received": {"score": "received"},
    "by keys": {"score": "key-norm"},
    "in blocks": {"score": "last", "block": 3},
    "by keys in blocks": {"score": "key-norm", "block": 3},
    "by chance": {"score": "random"},
    "recent": {"score": "recency", "prefix": 2},
    "renumbered": {"score": "last", "positions": "renumber"},
    "by numbers": {"score": "last", "keep": (6, 3)},
    "layers": {"score": "last", "site": "layer"},
}


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_sample_decodes_in_a_padded_batch_as_alone(name, options, tmp_path):
    graph, reduced = dropped(name, depth=3, **{"keep": (0.7, 0.4), "layers": "0-1", **options})
    model, ids = written(reduced, tmp_path), tokens(name, batch=3)
    lengths, mask, prompt = (PROMPT, 5, 1), torch.ones(3, PROMPT, dtype=torch.int64), ids[:, :PROMPT].clone()
    for row, length in enumerate(lengths):
        prompt[row] = (
            ids[row, PROMPT - length : PROMPT]
            .new_zeros(PROMPT)
            .index_copy(0, torch.arange(PROMPT - length, PROMPT), ids[row, :length])
        )
        mask[row, : PROMPT - length] = 0
    found = decoded(model, ids[:, PROMPT:], prompt, mask)
    for row, length in enumerate(lengths):
        own = torch.cat((ids[row : row + 1, :length], ids[row : row + 1, PROMPT:]), 1)
        alone = run(after_prompt(reduced, length), {"input_ids": own})["logits"]
        padded = torch.cat((found[0][:, -length:], *found[1:]), 1)[row : row + 1]
        assert error(padded, alone) <= tolerance(graph)


@pytest.mark.parametrize("score", ["last", "received", "key-norm", "change", "random", "recency", "earliest"])
def test_what_comes_after_a_prompt_changes_nothing_in_it(score):
    ids = tokens("llama")
    for block in (1, 4):
        _, reduced = dropped("llama", depth=3, keep=0.4, layers="0", score=score, block=block)
        for prompt in (PROMPT, PROMPT + 1):
            alone = run(reduced, {"input_ids": ids[:, :prompt]})["logits"]
            found = run(after_prompt(reduced, prompt), {"input_ids": ids})["logits"][:, :prompt]
            assert error(found, alone) <= tolerance(reduced)


@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
def test_a_written_model_is_checked_and_generates_what_its_graph_does(target, tmp_path):
    _, reduced = dropped("llama", depth=3, keep=(0.7, 0.4), layers="0-1", score="last")
    emission = propose(reduced, target)
    emit(emission, reduced.sources, tmp_path)
    assert verify(emission, tmp_path).holds
    ids = tokens("llama", batch=1, count=PROMPT)
    runner = Runner(tmp_path / "model.onnx", threads=1)
    found = [token for token, _ in runner.greedy(ids[0].tolist(), 6)]
    for _ in found:
        ids = torch.cat((ids, run(after_prompt(reduced, PROMPT), {"input_ids": ids})["logits"][:, -1:].argmax(-1)), 1)
    assert found == ids[0, PROMPT:].tolist()
    stages = json.loads(onnx.load(tmp_path / "model.onnx").metadata_props[-2].value)
    assert [row["layers"] for row in stages] == [[0], [1], [2]]


def test_all_of_a_prompt_is_the_original(tmp_path):
    graph, reduced = dropped("llama", depth=3, keep=(PROMPT + LATER + 1, PROMPT + LATER), score="last", layers="0-1")
    ids = tokens("llama")
    assert torch.equal(run(reduced, {"input_ids": ids})["logits"], run(graph, {"input_ids": ids})["logits"])
    found = decoded(written(reduced, tmp_path), ids[:, 3:], ids[:, :3], torch.ones_like(ids[:, :3]))
    assert error(torch.cat(found, 1), run(graph, {"input_ids": ids})["logits"]) <= tolerance(graph)


@pytest.mark.parametrize("target", ["genai", "ort-cuda"])
def test_runtimes_with_one_length_for_all_layers_are_refused(target):
    _, reduced = dropped("llama", depth=3, keep=0.5, layers="0", score="last")
    with pytest.raises(TargetError, match="one length for the caches of all layers"):
        propose(reduced, target)
