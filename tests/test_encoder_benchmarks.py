"""The pieces of the encoders' benchmark that numbers rest on: published methods, scores, and what they are told of."""

import copy

import pytest
import torch
import transformers

from benchmarks import encoders
from benchmarks.peers_prune import blocks
from benchmarks.peers_prune.parts import held

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.requires_grad_(False)


@pytest.fixture
def states():
    source = torch.Generator().manual_seed(2)
    return [torch.randn(1, 5, 8, generator=source) for _ in range(24)]


@torch.no_grad()
def pruned(model, method, keep):
    """The largest change of the output, and how many numbers were saved."""
    ids = torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(1))
    smaller = copy.deepcopy(model)
    getattr(blocks, method)(encoders.bert_blocks(smaller), lambda: smaller(ids), keep)
    lost = (smaller(ids).last_hidden_state - model(ids).last_hidden_state).abs().max().item()
    return lost, held(model) - held(smaller)


@pytest.mark.parametrize("method", ["magnitude", "flap"])
def test_encoders_lose_what_is_asked_for_and_nothing_else(method, model):
    assert pruned(model, method, 1.0) == (0, 0)
    lost, saved = pruned(model, method, 0.75)
    whole = blocks.numbers_of(encoders.bert_blocks(model))
    largest = max(map(blocks.unit_numbers, encoders.bert_blocks(model)))
    assert lost > 1e-4  # far above rounding
    assert 0.25 * whole <= saved <= 0.25 * whole + 2 * largest


def test_similarities_know_order_alone(states):
    """Scaling a sentence's states changes no cosine; other states do."""
    assert encoders.similarities(states, [(index + 1) * state for index, state in enumerate(states)]) == {
        "spearman": pytest.approx(1.0)
    }
    assert encoders.similarities(states, states[::-1])["spearman"] < 0.9


def test_neighbours_name_what_lies_nearest(states):
    labels, truth = torch.arange(20) % 2, torch.tensor([0, 1, 0, 1])
    apart = [state * 0.01 + (1 - 2 * (index % 2)) for index, state in enumerate(states)]
    assert encoders.neighbours(apart, apart, labels, truth) == {"accuracy": 1.0, "agrees": 1.0}
    turned = [*apart[:20], *(-state for state in apart[20:])]
    assert encoders.neighbours(apart, turned, labels, truth) == {"accuracy": 0.0, "agrees": 0.0}


def test_a_transcript_is_the_same_to_its_last_token_or_not():
    written = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 3, 0]]), 5).float()
    other = written.clone()
    other[0, 2] = other[0, 2].roll(1)
    found = encoders.transcripts([written, written], [written, other], [4])
    assert found == {"transcripts": 0.5, "tokens": pytest.approx(5 / 6)}


def test_the_error_is_relative(states):
    assert encoders.error(states, [1.5 * state for state in states]) == pytest.approx(0.5)
