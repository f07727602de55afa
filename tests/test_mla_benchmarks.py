"""The pieces of the latent-attention benchmarks that numbers rest on: windows, losses through a cache, needles."""

import argparse

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from benchmarks import mla_context, mla_report, mla_windows
from compiler.evaluate.metrics.needle import FACTS, haystack
from compiler.evaluate.metrics.position import window_losses
from compiler.evaluate.reader import Reader
from tests.tiny import TEXT, byte_tokenizer

TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}


@pytest.fixture(params=["whole", "sliding"])
def model(request):
    torch.manual_seed(0)
    if request.param == "whole":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**TINY, sliding_window=128, layer_types=layers)
    return transformers.Gemma3ForCausalLM(config).eval()


def test_windows_are_the_text_in_order():
    windows = mla_windows.tokens(byte_tokenizer(), TEXT, 100)
    expected = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])
    torch.testing.assert_close(windows.flatten(), expected[: windows.numel()])
    assert windows.shape == (len(expected) // 100, 100)


def test_windows_start_as_texts_do():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    windows = mla_windows.tokens(tokenizer, TEXT, 100)
    assert windows[:, 0].tolist() == [256] * len(windows)
    expected = torch.tensor(tokenizer(TEXT)["input_ids"][1:])
    torch.testing.assert_close(windows[:, 1:].flatten(), expected[: windows[:, 1:].numel()])


def test_a_seed_picks_windows():
    windows = torch.arange(50)[:, None]
    assert mla_windows.chosen(windows, 8, 0).flatten().tolist() == list(range(8))
    picks = [mla_windows.chosen(windows, 8, seed).flatten().tolist() for seed in (1, 1, 2)]
    assert picks[0] == picks[1] != picks[2]
    assert all(pick == sorted(set(pick)) and len(pick) == 8 for pick in picks)


def test_buckets_of_positions_hold_every_token_once(model):
    ids = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(1))
    found = mla_context.positions(model, ids, argparse.Namespace(length=300, windows=2))
    assert list(found) == ["1 to 128", "129 to 256", "257 to 512"]
    everything = torch.stack([window_losses(model, part) for part in ids.split(300)])
    counts = torch.tensor([127, 128, 44])
    assert (torch.tensor([*found.values()]) * counts).sum().item() / 299 == pytest.approx(everything.mean().item())


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_a_needle_lies_where_it_should(depth):
    tokenizer, fact = byte_tokenizer(), FACTS[0]
    filler = torch.tensor(tokenizer(TEXT)["input_ids"])
    prompt = tokenizer.decode(haystack(tokenizer, filler, fact, 1500, depth))
    assert prompt.count(fact.sentence) == 1
    assert prompt.endswith(f"{fact.question}\n{fact.start}")
    assert abs(prompt.index(fact.sentence) / len(prompt) - depth) < 0.1
    assert 1400 < len(prompt) <= 1500


def test_the_cache_is_counted_in_bytes():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    reader = Reader(model)
    reader.read(torch.arange(10))
    assert reader.bytes() == 10 * 2 * 2 * 16 * 4


def test_shares_are_taken_of_transmla_with_no_fewer_values():
    def row(method, cache, loss):
        return {"method": method, "setting": {}, "seed": 0, "cache": cache, "texts": {"t": {"losses": [1 + loss]}}}

    rows = [row("transmla", 192, 0.8), row("transmla", 256, 0.4), row("ours", 192.01, 0.2), row("ours", 200, 0.2)]
    table = mla_report.shares({"methods": rows}, {"t": 1.0})
    assert table[1:] == [["ours", "", "192.01", "0.25"], ["ours", "", "200", "0.50"]]
