"""Generated modules with the static caches of transformers: the same tokens, and one compiled step for all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from backends.safetensors import emit
from compiler.evaluate import load_model
from compiler.frontend.capture import capture
from compiler.target import emission_of
from passes.prune.depth import blocks_of, take_out
from tests import test_generated_pairs as pairs
from tests.families import FAMILIES
from tests.latent import latent_graph
from tests.test_generated import CAUSAL, LATENT, NEW_TOKENS, error, generated, greedy, tolerance, written
from tests.test_prune import context

STATIC = {"cache_implementation": "static", "disable_compile": True}


def padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """``ids`` with three tokens of padding before the first sequence and one in the second's place of a token."""
    longer = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    mask = torch.ones_like(longer)
    mask[:, :3] = 0
    mask[1, 3] = 0
    return longer, mask


def check_static(model, graph, ids: Tensor) -> None:
    """Static caches give the tokens of dynamic ones and of the graph, with padding on the left, too."""
    assert torch.equal(generated(model, ids, **STATIC), greedy(graph, ids))
    longer, mask = padded(ids)
    dynamic = generated(model, longer, attention_mask=mask)
    assert torch.equal(generated(model, longer, attention_mask=mask, **STATIC), dynamic)
    assert torch.equal(generated(model, ids[:1, :1], **STATIC), generated(model, ids[:1, :1]))


@pytest.mark.parametrize("name", CAUSAL)
def test_static_caches_give_the_same_tokens(name, tmp_path):
    graph = capture(FAMILIES[name].build(3, layers=2))
    check_static(written(graph, tmp_path / name), graph, FAMILIES[name].inputs(batch=2, tokens=6)["input_ids"])


@pytest.mark.parametrize("kind", LATENT)
def test_static_caches_hold_latents(kind, tmp_path):
    name, ranks, count, normed = LATENT[kind]
    graph = latent_graph(capture(FAMILIES[name].build(3, layers=3)), ranks, count, normed=normed)
    model = written(graph, tmp_path / kind.replace(" ", "_"))
    ids = FAMILIES[name].inputs(batch=2, tokens=6)["input_ids"]
    check_static(model, graph, ids)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    for layer, rank, pair in zip(cache.layers, ranks, count, strict=True):
        assert rank < 0 or (*layer.keys.shape[:2], layer.keys.shape[3], layer.values.shape[3]) == (2, 1, rank, 2 * pair)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_first_layer_may_have_no_attention(name, tmp_path):
    """Then it holds nothing, and another one knows how many tokens came before."""
    graph = capture(FAMILIES[name].build(3, layers=3))
    take_out(graph, blocks_of(graph, context(graph), ["sublayers"])[:1])
    assert len(graph.nodes_named("attention")) == 2
    model, ids = written(graph, tmp_path / name), FAMILIES[name].inputs(batch=2, tokens=6)["input_ids"]
    check_static(model, graph, ids)
    longer, mask = padded(ids)
    with torch.no_grad():
        whole = model(input_ids=longer, attention_mask=mask).logits
        cache = model(input_ids=longer[:, :-1], attention_mask=mask[:, :-1]).past_key_values
        last = model(input_ids=longer[:, -1:], attention_mask=mask, past_key_values=cache).logits
    assert error(last, whole[:, -1:]) <= tolerance(graph)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["sizes by layer", "windows", "caps", "no rotation", "keys and values"])
def test_static_caches_are_rounded_as_dynamic_ones(kind, bits, tmp_path):
    name, ranks, count, normed = LATENT.get(kind, ("gpt_oss", (-1, -1, -1), (0, 0, 0), False))
    graph = latent_graph(capture(FAMILIES[name].build(3, layers=3)), ranks, count, normed=normed)
    emit(emission_of(graph, cache_bits=bits), graph.sources, tmp_path)
    model = load_model(tmp_path, trust_remote_code=True)
    ids = FAMILIES[name].inputs(batch=2, tokens=12)["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        dynamic = model(input_ids=ids).logits
        steps = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([7, 1, 4], 1)]
    assert error(torch.cat(steps, 1), dynamic) <= 1e-5
    assert all(layer.keys.dtype == torch.uint8 for layer in cache.layers)


@pytest.mark.parametrize("kind", pairs.KINDS)
def test_encoder_decoders_write_the_same_with_static_caches(kind, tmp_path):
    graph = pairs.graph_of(*pairs.KINDS[kind])
    model = written(graph, tmp_path / "pair")
    given = pairs.encoded(pairs.inputs_of(pairs.KINDS[kind][0]))
    assert torch.equal(pairs.generated(model, given, **STATIC), pairs.greedy(graph, given))


PLAIN = {"keys and values": ("llama", (-1, -1), (0, 0), False), "positions": ("gpt2", (-1, -1), (0, 0), False)}


@pytest.mark.parametrize("kind", ["keys and values", "positions", "sizes by layer", "caps", "windows"])
@pytest.mark.parametrize("bits", [None, 8])
def test_decoding_is_compiled_once(kind, bits, tmp_path):
    """One graph does for every step; with windows a second one, which does not know the number of tokens."""
    name, ranks, count, normed = {**LATENT, **PLAIN}[kind]
    graph = latent_graph(capture(FAMILIES[name].build(3, layers=len(ranks))), ranks, count, normed=normed)
    emit(emission_of(graph, "generated", bits), graph.sources, tmp_path)
    model = load_model(tmp_path, trust_remote_code=True)
    ids = FAMILIES[name].inputs(batch=2, tokens=6)["input_ids"]
    longer, mask = padded(ids)
    expected = generated(model, longer, attention_mask=mask)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    found = decoded(model, compiled, longer, mask)
    assert torch.equal(found, expected)
    windows = any(getattr(model.config, "attention_windows", ()))  # whose layers count tokens in Python
    assert counter.frame_count == 1 + windows


def decoded(model, step, ids: Tensor, mask: Tensor) -> Tensor:
    """Greedy tokens with a static cache: what ``generate`` does, with ``step`` for all tokens but the first."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + NEW_TOKENS)
    run, new = model.forward, ids
    for _ in range(NEW_TOKENS):
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        given = model.prepare_inputs_for_generation(
            new, past_key_values=cache, attention_mask=mask, position_ids=places
        )
        with torch.no_grad():
            new = run(**given).logits[:, -1:].argmax(-1)
        ids, mask, run = torch.cat((ids, new), 1), torch.cat((mask, mask[:, :1] | 1), 1), step
    return ids
