"""A real model from end to end: SmolLM2-135M-Instruct out of its GGUF (``make test`` fetches it)."""

import json
from pathlib import Path

import pytest
import torch

from compiler import Recipe, capture, compress
from compiler.evaluate import cache_size, load_model, load_tokenizer
from compiler.evaluate.decode import greedy, prompt_ids
from compiler.evaluate.texts import TextData
from compiler.ir.execute import run

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ROOT / "benchmarks/data/persuasion.txt"
NEW_TOKENS = 64

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def original():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def windows(tokenizer):
    return TextData(TEXT, samples=2, length=128).windows(tokenizer)


@pytest.fixture(scope="module")
def expected(original, windows):
    with torch.no_grad():
        return original(windows).logits


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(MODEL), "passes": ["gqa-to-mla"]}))
    compress(Recipe.load(recipe), folder / "out")
    return load_model(folder / "out")


def test_the_captured_graph_is_bit_equal_to_transformers(windows, expected):
    (logits,) = run(capture(MODEL), {"input_ids": windows}).values()
    assert torch.equal(logits, expected)


def test_latent_attention_computes_the_same_function(latent, windows, expected):
    assert type(latent).__module__ == "transformers.models.deepseek_v3.modeling_deepseek_v3"
    with torch.no_grad():
        logits = latent(windows).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_latent_attention_writes_the_same_words(latent, original, tokenizer):
    ids = prompt_ids(tokenizer, "Tell me a story about a fox and a crow.", chat=True)
    ours, theirs = (list(greedy(each, ids, NEW_TOKENS, stop=False)) for each in (latent, original))
    assert len(theirs) == NEW_TOKENS
    assert ours == theirs


def test_latent_attention_has_the_same_live_cache(latent, original):
    assert cache_size(latent) == cache_size(original) is not None
