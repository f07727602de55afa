"""The published pruning methods that ours is measured beside, where theory says what they must give."""

import copy

import pytest
import torch
import transformers

from benchmarks.decoders import linear_numbers, numbers
from benchmarks.peers_low_rank import METHODS, apply, calibrate
from benchmarks.peers_prune import PEERS, modegpt
from benchmarks.peers_prune.parts import held
from benchmarks.peers_prune.slicegpt import width_for

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
KEPT = [(name, setting) for name in PEERS for setting in ({"keep": 0.75}, {"keep": 0.75, "what": "channels"})
        if name != "shortgpt" and ("what" not in setting or name == "flap")]  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()


@pytest.fixture
def windows():
    return torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def distance(model, other, windows):
    """The largest difference of logits, as a share of the largest logit."""
    logits = model(windows, use_cache=False).logits
    return ((other(windows, use_cache=False).logits - logits).abs().max() / logits.abs().max()).item()


def pruned(model, windows, method, **setting):
    smaller = copy.deepcopy(model)
    return smaller, PEERS[method].apply(smaller, PEERS[method].calibrate(smaller, windows), **setting)


@pytest.mark.parametrize("method", [name for name in PEERS if name != "slicegpt"])
def test_nothing_removed_is_exact(method, model, windows):
    for setting in PEERS[method].settings(1.0, model):
        same, saved = pruned(model, windows, method, **setting)
        assert (saved, distance(model, same, windows)) == (0, 0)


def test_the_whole_stream_in_another_basis_computes_the_same(model, windows):
    same, saved = pruned(model, windows, "slicegpt", cut=0.0)
    assert distance(model, same, windows) < 1e-5
    norms = (2 * 4 + 1) * 32
    assert saved == norms - 2 * 4 * 32**2 - 64 * 32  # shortcuts and a head of its own come in


@pytest.mark.parametrize(("method", "setting"), KEPT)
def test_as_many_parameters_remain_as_asked_for(method, setting, model, windows):
    smaller, saved = pruned(model, windows, method, **setting)
    part = saved / linear_numbers(model)
    assert saved == held(model) - held(smaller)
    assert distance(model, smaller, windows) > 1e-3
    assert 0.25 <= part < 0.25 + (0.05 if method != "slicegpt" else 0.2)


def test_the_lowest_layers_go(model, windows):
    smaller, saved = pruned(model, windows, "shortgpt", layers=1)
    assert len(smaller.base_model.layers) == 3
    assert saved == linear_numbers(model) // 4 + 2 * 32


def test_the_width_is_the_greatest_that_is_small_enough(model, windows):
    smaller, saved = pruned(model, windows, "slicegpt", keep=0.9)
    width, norms = width_for(model, 0.9), (2 * 4 + 1) * 32
    assert smaller.lm_head.weight.shape == (64, width)
    more = linear_numbers(model) // 32 + 2 * 64 + 2 * 4 * (2 * width + 1)
    assert norms <= saved - 0.1 * linear_numbers(model) < norms + more


def test_as_published_the_head_is_not_cut(model, windows):
    smaller, _ = pruned(model, windows, "slicegpt", cut=0.25)
    assert (smaller.model.embed_tokens.weight.shape, smaller.lm_head.weight.shape) == ((64, 24), (64, 32))


def test_zeros_compute_as_without_them(model, windows):
    smaller, saved = pruned(model, windows, "taylor", keep=0.75)
    (width,) = {int(layer.mlp.gate_proj.weight.any(1).sum()) for layer in smaller.base_model.layers}
    cut = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | {"intermediate_size": width})).eval()
    kept = [layer.mlp.gate_proj.weight.any(1) for layer in smaller.base_model.layers]
    state = smaller.state_dict()
    for name, tensor in state.items():
        if ".mlp." in name:
            rows = kept[int(name.split(".")[2])]
            state[name] = tensor[:, rows] if "down" in name else tensor[rows]
    cut.load_state_dict(state)
    assert distance(smaller, cut, windows) < 1e-5
    assert saved == numbers(model) - numbers(cut)


@torch.no_grad()
def test_what_carries_nothing_goes_first(model, windows):
    """Each type of MoDeGPT, on channels that are silent, queries that ask nothing, and values of a lower rank."""
    for layer in model.base_model.layers:
        layer.mlp.up_proj.weight[10:50] = 0
        layer.self_attn.q_proj.weight.view(4, 2, 4, 32)[:, :, 1:3] = 0
        values = layer.self_attn.v_proj.weight.view(2, 8, 32)
        values[:, 5:] = values[:, :3] - values[:, 2:5]
    found = modegpt.calibrate(model, windows)
    smaller = copy.deepcopy(model)
    for index, layer in enumerate(smaller.base_model.layers):
        modegpt.reduce_mlp(layer.mlp, found.channels[index], 56)
        modegpt.reduce_query_key(layer.self_attn, found.inputs[index], 2, 2)
        modegpt.reduce_value_output(layer.self_attn, found.inputs[index], 2, 5)
        assert int(layer.mlp.gate_proj.weight.any(1).sum()) == 56
        assert int(layer.self_attn.k_proj.weight.any(1).sum()) == 2 * 2 * 2
        assert int(layer.self_attn.o_proj.weight.any(0).sum()) == 4 * 5
    assert distance(model, smaller, windows) < 2e-2  # the ridge


def test_every_layer_loses_its_share():
    found = modegpt.sparsities([0.0, 0.1, 0.2, 0.9], 0.25)
    assert sum(found) == pytest.approx(1.0)
    assert found == sorted(found, reverse=True)
    crowded = modegpt.sparsities([0.0, 0.9, 0.9, 0.9], 0.5)
    assert max(crowded) == modegpt.MOST
    assert sum(crowded) == pytest.approx(2.0)


@pytest.mark.parametrize("method", METHODS)
def test_factors_hold_what_is_asked_for(method, model, windows):
    sums = calibrate(model, windows)
    whole = linear_numbers(model)
    saved = apply(model, sums, 0.75, method)
    assert 0.25 <= saved / whole < 0.35
