"""The published ways to quantise that ours is measured beside, where theory says what they must give."""

import copy
import json
import venv
from dataclasses import replace

import pytest
import torch
import transformers

from benchmarks.decoders import linear_numbers, linears
from benchmarks.peers_quantize import FLOAT, GROUP, PEERS, half_quadratic, rounded, solved, unclipped
from benchmarks.peers_quantize.outside import Job, finish
from benchmarks.peers_quantize.packages import HERE, PACKAGES, Package
from benchmarks.quantize import entry, packaged
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


SCRIPT = """
import json, shutil, sys
job = json.loads(sys.argv[1])
shutil.copytree(job["model"], job["out"])
print(json.dumps(job))
print(json.dumps({"bits": job["bits"] + 0.5}))
"""


def test_a_package_runs_in_an_environment_of_its_own(tmp_path):
    script, environment, out = tmp_path / "script.py", tmp_path / "environment", tmp_path / "out"
    script.write_text(SCRIPT)
    (tmp_path / "model").mkdir()
    venv.create(environment)
    package = Package(str(script), "gptq", (), environment, symmetric=(True, False))
    outside = packaged(package)
    assert outside.settings(3.0) == [{"bits": 3, "symmetric": True}, {"bits": 3, "symmetric": False}]
    kept, done = outside.make(tmp_path / "model", tmp_path / "windows.pt", outside.settings(3.0)[1], out, 1)
    said = Job(**json.loads(done.output.splitlines()[0]))
    assert kept == 3.5 / FLOAT and out.is_dir()
    assert (said.method, said.bits, said.group, said.symmetric) == ("gptq", 3, GROUP, False)


def test_scripts_of_packages_are_there_and_count_what_they_store(capsys):
    scripts = {package.script for package in PACKAGES.values()}
    assert all((HERE / script).is_file() for script in scripts)
    job = Job("model", "windows", "out", "gptq", 3, GROUP, True, 1)
    finish(job, FLOAT)
    finish(replace(job, symmetric=False), FLOAT)
    finish(job, 16, 16)
    assert [json.loads(line)["bits"] for line in capsys.readouterr().out.splitlines()] == [3.5, 3.5 + 3 / GROUP, 3.5]
