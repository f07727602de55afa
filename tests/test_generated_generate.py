"""What ``generate`` can do with a generated module, whatever the layout of its cache: the plain tokens each way."""

from __future__ import annotations

import copy

import pytest
import torch

from backends.safetensors import emit
from compiler.evaluate import load_model
from compiler.frontend.capture import capture
from compiler.target import emission_of
from tests.families import FAMILIES
from tests.latent import latent_graph
from tests.test_drop_tokens import dropped
from tests.test_generated import LATENT, error, generated, tolerance, written
from tests.test_generated_static import STATIC, padded

LAYOUTS = {
    "keys and values": ("llama", (), (), 0),
    "windows": ("gemma3", (), (), 0),
    "latents": (LATENT["sizes by layer"][0], *LATENT["sizes by layer"][1:3], 0),
    "latents and windows": (LATENT["windows"][0], *LATENT["windows"][1:3], 0),
    "bytes": ("qwen3", (), (), 8),
    "latents of half bytes": ("llama", (16, 11, 8), (4, 2, 3), 4),
    "bytes, windows, sinks": ("gpt_oss", (), (), 8),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def subject(request, tmp_path_factory):
    """A model, and two prompts longer than its windows."""
    name, ranks, pairs, bits = LAYOUTS[request.param]
    graph = capture(FAMILIES[name].build(3, layers=3))
    graph = latent_graph(graph, ranks, pairs) if ranks else graph
    directory = tmp_path_factory.mktemp("layout")
    emit(emission_of(graph, "generated", bits or None), graph.sources, directory)
    model = load_model(directory, trust_remote_code=True)
    return graph, model, FAMILIES[name].inputs(batch=2, tokens=13)["input_ids"]


@pytest.mark.parametrize("static", [{}, STATIC], ids=["dynamic", "static"])
def test_prompts_can_be_read_in_chunks(subject, static):
    _, model, ids = subject
    plain = generated(model, ids)
    assert torch.equal(generated(model, ids, prefill_chunk_size=4, **static), plain)
    longer, mask = padded(ids)
    expected = generated(model, longer, attention_mask=mask)
    assert torch.equal(generated(model, longer, attention_mask=mask, prefill_chunk_size=4, **static), expected)


def test_beams_are_those_of_decoding_without_a_cache(subject):
    _, model, ids = subject
    if getattr(model.config, "cache_bits", 0):
        model = copy.deepcopy(model)
        model.config.cache_bits = 0
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_an_assistant_changes_no_token(subject):
    """Tokens that it proposed are taken back where they are not the model's: out of every layer of the cache."""
    _, model, ids = subject
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for weight in list(assistant.parameters())[-3:]:
            if weight.is_floating_point():
                weight.mul_(1.3)
    plain = generated(model, ids[:1])
    assert torch.equal(generated(model, ids[:1], assistant_model=assistant), plain)
    assert torch.equal(generated(model, ids[:1], prompt_lookup_num_tokens=2), plain)


def test_it_is_saved_and_placed_with_its_cache(subject, tmp_path):
    graph, model, ids = subject
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", trust_remote_code=True)
    assert getattr(again.config, "cache_bits", 0) == getattr(model.config, "cache_bits", 0)
    placed = type(model).from_pretrained(tmp_path / "again", device_map={"": "cpu"}).eval()
    with torch.no_grad():
        logits = model(ids).logits
        assert error(again(ids).logits, logits) <= tolerance(graph)
        assert error(placed(ids).logits, logits) <= tolerance(graph)
    assert torch.equal(generated(placed, ids), generated(model, ids))


def test_prompts_that_lose_tokens_refuse_what_would_undo_or_part_them(tmp_path):
    _, reduced = dropped("llama", depth=4, keep=(0.7, 0.4), layers="0,2", score="last")
    model, ids = written(reduced, tmp_path / "out"), FAMILIES["llama"].inputs(batch=2, tokens=13)["input_ids"]
    with pytest.raises(ValueError, match="leave out prefill_chunk_size"):
        generated(model, ids, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generated(model, ids[:1], prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="a static cache cannot hold"):
        generated(model, ids, **STATIC)
    best = model.generate(ids, num_beams=3, num_return_sequences=3, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert best.shape == (6, 16)
