"""Generated encoder-decoders: what is written from a graph computes and writes what the graph does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compiler.evaluate import load_model
from compiler.frontend.capture import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from tests.families import FAMILIES
from tests.latent import latent_graph
from tests.test_generated import NEW_TOKENS, error, tolerance, written

START = 1


def greedy(graph: Graph, given: dict[str, Tensor], count: int = NEW_TOKENS) -> Tensor:
    """Greedy tokens of the decoder by a whole forward of the graph for each."""
    ids = torch.full((len(next(iter(given.values()))), 1), START)
    for _ in range(count):
        logits = run(graph, {**given, "decoder_input_ids": ids})["logits"]
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids


def generated(model, given: dict[str, Tensor], **options) -> Tensor:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(**given, max_new_tokens=NEW_TOKENS, decoder_start_token_id=START, **options)


def split(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the encoder gets, and all of it."""
    return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}, inputs


KINDS = {
    "t5": ("t5", (), ()),
    "whisper": ("whisper", (), ()),
    "whisper, latent": ("whisper", (12, 12, 12), (0, 0, 0)),
    "whisper, latents of several sizes": ("whisper", (12, -1, 8), (0, 0, 0)),
}


def graph_of(name: str, ranks: tuple[int, ...], pairs: tuple[int, ...], layers: int = 3) -> Graph:
    graph = capture(FAMILIES[name].build(3, layers=layers))
    return latent_graph(graph, ranks, pairs) if ranks else graph


@pytest.mark.parametrize("kind", KINDS)
def test_a_generated_encoder_decoder_computes_and_writes_as_its_graph(kind, tmp_path):
    graph = graph_of(*KINDS[kind])
    model = written(graph, tmp_path / "model")
    given, inputs = split(FAMILIES[KINDS[kind][0]].inputs())
    with torch.no_grad():
        found = model(**inputs)
    for name, value in run(graph, inputs).items():
        assert error(found[name], value) <= tolerance(graph)
    expected = greedy(graph, given)
    assert torch.equal(generated(model, given), expected)
    assert torch.equal(generated(model, given, use_cache=False), expected)
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(generated(again, given), expected)
