"""The published ways to make weights sparse that ours is measured beside, where theory says what they must give."""

import copy

import pytest
import torch
import transformers

from benchmarks.decoders import linear_numbers, linears
from benchmarks.peers_sparsify import METHODS, PEERS, sparsegpt, wanda
from benchmarks.sparsify import BENCHMARK, entry, not_zero
from passes import Sparsify
from passes.sparsify.solve import Problem
from tests.test_peers_prune import TINY


@pytest.mark.parametrize("method", METHODS)
def test_as_many_elements_are_zero_as_were_asked_for(method):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    windows = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(1))
    for setting in PEERS[method].settings(0.5, model):
        smaller = copy.deepcopy(model)
        zeros = PEERS[method].apply(smaller, PEERS[method].calibrate(smaller, windows), **setting)
        assert zeros == linear_numbers(model) / 2
        assert not_zero(model, smaller) == 0.5
        if "pattern" in setting:
            for part in linears(smaller).values():
                assert ((part.weight != 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_sparsegpt_makes_up_for_what_wanda_loses():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 256, generator=generator)
    x = torch.randn(1024, 256, generator=generator) @ torch.randn(256, 256, generator=generator) / 16
    second = x.T @ x / len(x)
    judge = Problem(weight, second, torch.ones(16))
    for part in (0.5, (2, 4)):
        assert judge.cost(sparsegpt(weight, second, part)) < 0.8 * judge.cost(wanda(weight, second, part))


def test_settings_of_ours_are_options_of_the_pass():
    for own in BENCHMARK.ours:
        ((name, options),) = entry({"keep": 0.5, **own}).items()
        assert Sparsify.key() == name and Sparsify(**options).calibrated
