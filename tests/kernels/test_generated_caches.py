"""Generated modules read rounded caches by kernels when they decode: as they compute with what is unpacked."""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from backends.kernels import cached_decode, latent_decode
from backends.safetensors import emit
from compiler.evaluate import load_model
from compiler.frontend.capture import capture
from compiler.target import emission_of
from tests.families import FAMILIES
from tests.kernels.law import DEVICE
from tests.latent import latent_graph
from tests.test_generated import error, tolerance

KINDS = {
    "keys and values": ("llama", (), ()),
    "windows and sinks": ("gpt_oss", (), ()),
    "caps": ("gemma2", (), ()),
    "latents": ("llama", (16, 11), (4, 2)),
    "latents and windows": ("gemma3", (16, 12), (3, 2)),
}
PROMPT = 20


def counted(kernel: ModuleType, calls: list[str]) -> Any:
    """``kernel`` as its launches compute it, on the CPU by the interpreter."""

    def call(*inputs: Any, **named: Any) -> torch.Tensor:
        assert kernel.outside(*inputs, **named) is None
        calls.append(kernel.__name__)
        return kernel.plan(*inputs, **named).run()

    return call


@pytest.mark.parametrize(("bits", "static"), [(8, False), (4, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_by_kernels_is_that_of_unpacked_caches(kind, bits, static, tmp_path, monkeypatch):
    name, ranks, pairs = KINDS[kind]
    graph = capture(FAMILIES[name].build(3, layers=2))
    graph = latent_graph(graph, ranks, pairs) if ranks else graph
    emit(emission_of(graph, cache_bits=bits), graph.sources, tmp_path)
    model = load_model(tmp_path, trust_remote_code=True).to(DEVICE)
    module = sys.modules[type(model).__module__]
    ids = FAMILIES[name].inputs(batch=2, tokens=PROMPT + 1)["input_ids"].to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cache = StaticCache(config=model.config, max_cache_len=24) if static else DynamicCache(config=model.config)
    monkeypatch.setattr(module, "decodes", lambda _: False)
    with torch.no_grad():
        model(input_ids=ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], past_key_values=cache)
        other = copy.deepcopy(cache)
        expected = model(input_ids=ids[:, PROMPT:], attention_mask=mask, past_key_values=cache).logits
        calls: list[str] = []
        monkeypatch.setattr(module, "decodes", lambda _: True)
        for kernel, operation in ((cached_decode, "cached_decode"), (latent_decode, "latent_decode")):
            monkeypatch.setattr(module, operation, counted(kernel, calls), raising=False)
        found = model(input_ids=ids[:, PROMPT:], attention_mask=mask, past_key_values=other).logits
    assert len(calls) == len(other.layers)
    assert all(layer.keys.dtype == torch.uint8 for layer in other.layers)
    assert error(found, expected) <= tolerance(graph)
