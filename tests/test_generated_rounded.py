"""Generated modules whose caches are rounded to few bits: how far that goes, and how many bytes a token takes."""

from __future__ import annotations

import sys

import pytest
import torch

from backends.safetensors import emit
from compiler.errors import TargetError
from compiler.evaluate import load_model
from compiler.frontend.capture import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.target import emission_of
from tests.families import FAMILIES
from tests.latent import latent_graph
from tests.test_generated import LATENT, error, tolerance


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["sizes by layer", "windows", "some layers", "no rotation"])
def test_latents_are_cached_in_few_bits(kind, bits, tmp_path):
    """Without the cache nothing changes; with it the error is that of rounding, and a token takes so many bytes."""
    name, ranks, pairs, normed = LATENT[kind]
    graph = latent_graph(capture(FAMILIES[name].build(3, layers=3)), ranks, pairs, normed=normed)
    directory = tmp_path / f"{kind.replace(' ', '_')}_{bits}"
    directory.mkdir()
    emit(emission_of(graph, cache_bits=bits), graph.sources, directory)
    layers = check_rounded_cache(graph, load_model(directory, trust_remote_code=True), bits, name)
    for layer, rank, count in zip(layers, ranks, pairs, strict=True):
        assert layer.keys.dtype == torch.uint8
        if rank >= 0:
            assert layer.keys.shape[-1] == packed_bytes(rank, bits)
            assert layer.values.shape[-1] == packed_bytes(2 * count, bits)


def check_rounded_cache(graph: Graph, model, bits: int, name: str) -> list:
    """What a cache of few bits has to be like. Gives back its layers after twelve tokens."""
    given = FAMILIES[name].inputs(batch=2, tokens=12)
    logits = run(graph, given)["logits"]
    with torch.no_grad():
        assert error(model(**given, use_cache=False).logits, logits) <= tolerance(graph)
        output = model(**given)
        assert tolerance(graph) < error(output.logits, logits) < {8: 0.05, 4: 0.6}[bits]  # the weights are random
        ids = given["input_ids"]
        cache = model(input_ids=ids[:, :7]).past_key_values
        continued = model(input_ids=ids[:, 7:], past_key_values=cache).logits
        assert error(continued, output.logits[:, 7:]) <= tolerance(graph)
        model.config.cache_bits = 0
        assert error(model(**given).logits, logits) <= tolerance(graph)
    return output.past_key_values.layers


@pytest.mark.parametrize(("name", "bits"), [("llama", 8), ("llama", 4), ("gemma2", 8), ("gemma3", 4), ("gpt_oss", 8)])
def test_keys_and_values_are_cached_in_few_bits(name, bits, tmp_path):
    """Of windows only what they see; one group of bytes for each token and head."""
    graph = capture(FAMILIES[name].build(3, layers=2))
    emit(emission_of(graph, cache_bits=bits), graph.sources, tmp_path)
    layers = check_rounded_cache(graph, load_model(tmp_path, trust_remote_code=True), bits, name)
    for layer, node in zip(layers, graph.nodes_named("attention"), strict=True):
        _, groups, _, size = node.input(1).shape
        kept = (node.attr("window") or 13) - 1
        assert layer.keys.dtype == torch.uint8
        assert layer.keys.shape == layer.values.shape == (2, groups, min(kept, 12), packed_bytes(size, bits))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1, 7, 16, 64, 65, 130, 192])
def test_what_is_packed_comes_back_rounded(bits, size, tmp_path):
    """Within half a step of the group that an element is in; a bfloat16 scale makes a step up to 2^-8 off."""
    graph = latent_graph(capture(FAMILIES["llama"].build(3, layers=2)), (8, 8), (2, 2))
    directory = tmp_path / "packed"
    directory.mkdir()
    emit(emission_of(graph, cache_bits=bits), graph.sources, directory)
    module = sys.modules[type(load_model(directory, trust_remote_code=True)).__module__]
    magnitudes = torch.tensor([1e-6, 1, 40, 1e4, 3])[:, None]
    x = torch.randn(2, 5, size, generator=torch.Generator().manual_seed(size)) * magnitudes
    x[0, 0] = 0
    found = module.unpack(module.pack(x, bits), size, bits, torch.float32)
    width = -(-size // -(-size // 64))
    width += width % 2
    for start in range(0, size, width):
        part = slice(start, start + width)
        largest = x[..., part].abs().amax(-1, keepdim=True)
        step = largest / (2 ** (bits - 1) - 1)
        assert ((found - x)[..., part].abs() <= 0.5 * step + largest * 2.0**-8 + 1e-30).all()
    basis = module.CompressedLlamaLatentRotation.basis(size)
    torch.testing.assert_close(basis @ basis.T, torch.eye(size), rtol=0, atol=4 * size * torch.finfo(torch.float32).eps)


def packed_bytes(size: int, bits: int) -> int:
    """One group: codes of an even number of elements, and a scale of two bytes."""
    return (size + size % 2) * bits // 8 + 2 if size else 0


def test_few_bits_need_a_cache():
    with pytest.raises(TargetError, match="a cache of fewer bits is for models that continue"):
        emission_of(capture(FAMILIES["bert"].config(), architecture=FAMILIES["bert"].architecture), cache_bits=8)
