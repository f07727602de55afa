"""The published conversions that ours is measured beside, where theory says what they must give."""

import copy

import pytest
import torch
import transformers

from benchmarks.peers_mla import mha2mla, transmla, whitened
from benchmarks.peers_mla.as_graph import TransMla
from benchmarks.peers_mla.attention import Shape, mean_loss, open_up
from compiler import Pipeline, capture

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "grouped": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)),
    "multi-query": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY | {"num_key_value_heads": 1, "attention_bias": True})
    ),
    "normed": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY)),
    "normed, windows": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**TINY, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    ),
}
SMOLLM2 = Shape(hidden=576, heads=9, groups=3, head_dim=64)


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def windows():
    return torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def distance(model, other, windows):
    """The largest difference of logits, as a share of the largest logit."""
    logits = model(windows).logits
    return ((other(windows).logits - logits).abs().max() / logits.abs().max()).item()


def test_opened_attention_computes_the_same(model, windows):
    opened = copy.deepcopy(model)
    open_up(opened)
    assert distance(model, opened, windows) < 1e-5


def test_low_rank_is_exact_at_full_rank_and_not_below(model, windows):
    kv = open_up(copy.deepcopy(model)).kv
    full = whitened.convert(copy.deepcopy(model), windows, rank=kv, rope_dim=16)
    half = whitened.convert(copy.deepcopy(model), windows, rank=kv // 2, rope_dim=16)
    assert distance(model, full, windows) < 1e-5 < distance(model, half, windows)


def test_partial_positions_are_exact_when_all_pairs_keep_theirs(model, windows):
    kv = open_up(copy.deepcopy(model)).kv
    every = mha2mla.convert(copy.deepcopy(model), windows, rank=kv, rope_dim=16)
    some = mha2mla.convert(copy.deepcopy(model), windows, rank=kv + kv // 2, rope_dim=8)
    assert distance(model, every, windows) < 1e-5 < distance(model, some, windows)


def test_as_a_graph_it_is_the_published_conversion(model, windows):
    rank, rope_dim = 12, 8
    graph = capture(model)
    Pipeline([TransMla(copy.deepcopy(model), windows, rank, rope_dim)]).run(graph)
    published = transmla.convert(copy.deepcopy(model), windows, rank, rope_dim)
    logits = published(windows).logits
    assert distance(model, published, windows) > 1e-3
    assert (graph.to_torch()(input_ids=windows)["logits"] - logits).abs().max() < 2e-5 * logits.abs().max()


@torch.no_grad()
def test_one_head_of_positions_without_folding_is_exact_for_one_head_alone(model, windows):
    converted = copy.deepcopy(model)
    shape = open_up(converted)
    transmla.set_bases(converted, transmla.key_moments(converted, windows), fold=1, rope_dim=16)
    transmla.apply(converted, transmla.joint_moments(converted, windows), rank=2 * shape.kv - 16, rope_dim=16)
    assert (distance(model, converted, windows) < 1e-5) == (shape.groups == 1)


@torch.no_grad()
@pytest.mark.parametrize("peer", [transmla, mha2mla, whitened])
def test_ranks_in_turn_are_as_from_the_original(peer, model, windows):
    kv = open_up(copy.deepcopy(model)).kv
    turns, fresh = copy.deepcopy(model), copy.deepcopy(model)
    calibrated = peer.calibrate(turns, windows, 8)
    for rank in (kv // 4, kv // 2):
        peer.apply(turns, calibrated, rank, 8)
    assert distance(peer.convert(fresh, windows, kv // 2, 8), turns, windows) == 0


@pytest.mark.parametrize(("fold", "rope_dim"), [(1, 16), (2, 16), (4, 16), (8, 16), (2, 8), (4, 8), (8, 8), (8, 2)])
def test_the_rotation_is_orthogonal(fold, rope_dim):
    shape = Shape(hidden=32, heads=4, groups=2, head_dim=16)
    keys = torch.randn(32, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = transmla.rotation(keys @ keys.T, shape, fold, rope_dim)
    torch.testing.assert_close(basis.T @ basis, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-12)


@torch.no_grad()
def test_best_split_is_no_worse_on_its_trial_than_the_published_one(windows):
    torch.manual_seed(0)
    model = FAMILIES["grouped"]().eval()
    shape = open_up(copy.deepcopy(model))
    published = mha2mla.convert(copy.deepcopy(model), windows, *mha2mla.split(shape, 24))
    best = copy.deepcopy(model)
    mha2mla.apply_best(best, mha2mla.calibrate(best, windows, 0), *mha2mla.split_best(shape, 24))
    assert mean_loss(best, windows) <= mean_loss(published, windows)


def test_sizes_of_smollm2():
    """Cached values per token and layer, and TransMLA's published growth of the decoder's matrices."""
    assert transmla.split(SMOLLM2, 256) == (192, 64)
    assert mha2mla.split(SMOLLM2, 256) == (232, 8)
    assert whitened.split(SMOLLM2, 256) == (128, 64)
    for peer in (transmla, mha2mla, whitened):
        assert peer.size(SMOLLM2, *peer.split(SMOLLM2, 192)).cache == 192
    original = 2 * (9 + 3) * 64 * 576 + 3 * 576 * 1536
    grown = transmla.size(SMOLLM2, 192, 64).parameters - 2 * (9 + 3) * 64 * 576
    assert round(100 * grown / original, 1) == 13.5
