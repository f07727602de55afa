"""Latent attention with a smaller cache as checkpoints: what transformers computes, continues and caches with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.safetensors import emit
from compiler.evaluate import load_model
from compiler.ir.execute import run
from compiler.ir.facts import attention_sites, latent_sites
from compiler.target import emission_of
from passes.gqa_to_mla.source import compressible
from tests.captures import graph_of
from tests.families import FAMILIES
from tests.test_mla_truncation import ROUNDING
from tests.truncation import (
    batches,
    reduced,
    token_ids,
)

STOCK = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "a bias on the way out": ("llama", {"attention_bias": True}),
}
GENERATED = {
    "norms of heads": ("qwen3", {}, torch.float32),
    "windows and caps": ("gemma2", {}, torch.float32),
    "windows and norms, two tables": ("gemma3", {}, torch.float32),
    "no rotation": ("gpt2", {}, torch.float32),
    "float16": ("llama", {}, torch.float16),
}
NEW_TOKENS = 8


class Reduced:
    """A family's tiny model with a smaller cache, written by ``emission_of`` and read by plain transformers."""

    def __init__(self, name: str, directory, dtype=torch.float32, **changes):
        self.family = FAMILIES[name]
        self.graph = graph_of(name, 3, dtype=dtype, **changes)
        self.rotary = 2 * (compressible(attention_sites(self.graph)[0]).pairs // 2)
        reduced(self.graph, batches(), rank=14, rope_dim=self.rotary)
        self.emission = emission_of(self.graph)
        directory.mkdir()
        emit(self.emission, self.graph.sources, directory)
        self.model = load_model(directory, trust_remote_code=bool(self.emission.files))

    def check(self) -> None:
        """Logits, greedy text and the live cache are the graph's."""
        ids = token_ids(2, 10)["input_ids"]
        wanted = run(self.graph, {"input_ids": ids})["logits"]
        with torch.no_grad():
            found = self.model(ids, use_cache=True)
        assert (found.logits - wanted).abs().max() <= ROUNDING * wanted.abs().max()
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(self.model.generate(ids, max_new_tokens=NEW_TOKENS, **options), self.greedy(ids))
        held = sum(tensor.numel() for tensor in cached_tensors(found.past_key_values))
        seen = [self.tokens_held(site.window, ids.shape[1]) for site in latent_sites(self.graph)]
        assert held == len(ids) * sum(seen) * (14 + self.rotary)

    @staticmethod
    def tokens_held(window: int, tokens: int) -> int:
        """Before the next token comes, whose own key and value complete a window."""
        return min(tokens, window - 1) if window else tokens

    def greedy(self, ids: Tensor) -> Tensor:
        for _ in range(NEW_TOKENS):
            ids = torch.cat((ids, run(self.graph, {"input_ids": ids})["logits"][:, -1:].argmax(-1)), 1)
        return ids


def cached_tensors(cache) -> list[Tensor]:
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return [tensor for tensor in held if isinstance(tensor, Tensor)]


@pytest.mark.parametrize(("name", "changes"), STOCK.values(), ids=STOCK.keys())
def test_a_stock_checkpoint_computes_continues_and_caches_as_the_graph(name, changes, tmp_path):
    made = Reduced(name, tmp_path / "out", **changes)
    assert (made.emission.architecture, made.emission.files) == ("DeepseekV3ForCausalLM", {})
    made.check()


@pytest.mark.parametrize(("name", "changes", "dtype"), GENERATED.values(), ids=GENERATED.keys())
def test_a_generated_module_computes_continues_and_caches_as_the_graph(name, changes, dtype, tmp_path):
    made = Reduced(name, tmp_path / "out", dtype, **changes)
    assert made.emission.files
    made.check()
