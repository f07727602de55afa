"""Samples that a model writes itself: its own continuations, the same for a seed, mixed with the windows of a text."""

import json

import pytest
import torch
import transformers

from compiler.errors import DataError
from compiler.evaluate import load_model
from compiler.evaluate.own_text import own_text
from compiler.job import compress
from compiler.recipe import Recipe
from tests.tiny import byte_tokenizer, write_text

LLAMA = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def llama(certain=False):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    if certain:  # the likeliest token is the only one
        model.lm_head.weight.data *= 1e4
    return model


def test_a_model_that_is_certain_writes_what_it_generates_greedily():
    model, tokenizer = llama(certain=True), byte_tokenizer()
    ids = own_text(model, tokenizer, 5, 24, 0)
    start = len(tokenizer("")["input_ids"]) + 1
    with torch.no_grad():
        expected = model(ids).logits[:, start - 1 : -1].argmax(-1)
    assert ids.shape == (5, 24)
    assert torch.equal(ids[:, start:], expected)


def test_samples_follow_the_seed_and_what_the_model_takes():
    model, tokenizer = llama(), byte_tokenizer()
    first, again, other = (own_text(model, tokenizer, 3, 16, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert own_text(model, tokenizer, 1, 1000, 0).shape == (1, 128)


def test_samples_are_drawn_from_the_distribution_of_the_model():
    model, tokenizer = llama(), byte_tokenizer()
    model.lm_head.weight.data.zero_()  # every token is as likely as every other
    drawn = own_text(model, tokenizer, 64, 65, 0)[:, -64:].flatten()
    counts = torch.bincount(drawn, minlength=256).double()
    expected = drawn.numel() / 256
    chi_square = float(((counts - expected).square() / expected).sum())
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5  # five standard deviations of a chi-square of 255


def test_a_model_that_continues_nothing_writes_nothing():
    config = transformers.BertConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(DataError, match="does not continue texts"):
        own_text(transformers.BertModel(config), byte_tokenizer(), 1, 8, 0)


def test_a_recipe_calibrates_on_both(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = write_text(tmp_path)
    found = {}
    for written in (0, 6):
        recipe = {
            "model": str(tmp_path / "model"),
            "calibration": {"data": str(text), "samples": 4, "length": 16, "written": written},
            "passes": [{"prune": {"keep": "80%", "score": "activation", "refit": False}}],
        }
        path = tmp_path / f"{written}.json"
        path.write_text(json.dumps(recipe))
        result = compress(Recipe.load(path), tmp_path / f"out-{written}")
        timing = json.loads((result.path / "compress" / "timings.json").read_text())
        assert ("write calibration samples" in timing["seconds"]) == bool(written)
        found[written] = load_model(tmp_path / f"out-{written}").state_dict()
    assert any(not torch.equal(a, b) for a, b in zip(found[0].values(), found[6].values(), strict=True))
