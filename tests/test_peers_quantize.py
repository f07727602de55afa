"""The published ways to quantise that ours is measured beside, where theory says what they must give."""

import copy

import pytest
import torch
import transformers

from benchmarks.decoders import linear_numbers, linears
from benchmarks.peers_quantize import FLOAT, GROUP, PEERS, half_quadratic, rounded, solved, unclipped
from benchmarks.quantize import entry
from passes import Quantize
from passes.quantize.solve import Problem
from tests.test_peers_prune import TINY


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_groups_take_no_more_values_than_bits_can_say(method, bits):
    torch.manual_seed(0)
    wide = {**TINY, "hidden_size": 2 * GROUP, "intermediate_size": 4 * GROUP, "head_dim": GROUP}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide)).eval()
    windows = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    peer, smaller = PEERS[method], copy.deepcopy(model)
    saved = peer.apply(smaller, peer.calibrate(smaller, windows), bits=bits)
    assert saved == linear_numbers(model) * (1 - (bits + FLOAT / GROUP) / FLOAT)
    for before, after in zip(linears(model).values(), linears(smaller).values(), strict=True):
        assert not torch.equal(before.weight, after.weight)
        groups = after.weight.detach().reshape(-1, GROUP)
        assert max(len(group.unique()) for group in groups) <= 2**bits


def test_gptq_makes_up_for_what_rounding_loses():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 256, generator=generator)
    x = torch.randn(1024, 256, generator=generator) @ torch.randn(256, 256, generator=generator) / 16
    judge = Problem(weight, x.T @ x)
    plain = rounded(weight.unflatten(1, (-1, GROUP)), unclipped(weight.unflatten(1, (-1, GROUP)), 3)[..., None], 3)
    assert judge.cost(solved(weight, x.T @ x, 3, unclipped)) < 0.5 * judge.cost(plain.flatten(1))


def test_hqq_keeps_what_lies_on_a_grid():
    codes = torch.randint(0, 8, (5, 2, GROUP), generator=torch.Generator().manual_seed(0)).float()
    codes[..., :2] = torch.tensor([0.0, 7.0])
    groups = (codes - 3) * 0.25
    assert torch.allclose(half_quadratic(groups, 3), groups, atol=1e-6)


def test_settings_of_ours_are_options_of_the_pass():
    given = entry({"keep": 3.0, "method": "refined"})["quantize"]
    assert given["bits"] == 3 and isinstance(given["bits"], int)
    assert Quantize(**given).system(given["bits"]).group == GROUP
    assert entry({"keep": 3.5})["quantize"]["bits"] == 3.5
