"""Healing: what it may never do, what it must bring about, and that it can be interrupted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compiler.calibration.distil.whole
from compiler.calibration.distil.loss import divergence
from compiler.calibration.distil.weights import Adam, Trained
from compiler.calibration.distil.windows import divide, order
from compiler.calibration.fidelity import Fidelity
from compiler.calibration.sweep import differentiable
from compiler.errors import PassError, SelectorError
from compiler.ir.execute import read_param, run
from compiler.ir.layers import copy_of
from compiler.ir.select import Selector
from compiler.pipeline import Pass, Pipeline
from compiler.weights.spill import Progress
from passes.drop_tokens import DropTokens
from passes.gqa_to_mla import GqaToMla
from passes.heal import Heal
from tests.captures import graph_of
from tests.families import FAMILIES
from tests.graphs import tiny_llama

TOLERANCE = 1e-5  # float32, relative to the scale


@dataclass(frozen=True)
class Damage(Pass):
    """Keep half of the singular values of the chosen weights."""

    where: Selector = "attention"
    exact_when: ClassVar = None

    def run(self, graph, ctx):
        for param in ctx.select(self.where):
            left, values, right = torch.linalg.svd(ctx.read(param).float(), full_matrices=False)
            values[len(values) // 2 :] = 0
            param.expr = ctx.spill(param.name, (left * values @ right).to(param.storage))


@dataclass(frozen=True)
class Nothing(Pass):
    """Leave everything as it is."""

    def run(self, graph, ctx):
        pass


def windows(name, count=72, length=32):
    """More than ``windows`` hold in weights, so that what is learnt is no accident of the data."""
    return [FAMILIES[name].inputs(batch=1, tokens=length, seed=seed) for seed in range(count)]


def healed(name, damage, heal, *, workdir=None, data=None):
    graph = graph_of(name)
    data = data or windows(name)
    report = Pipeline([damage, heal]).run(graph, workdir=workdir, calibration=lambda _: data)
    return graph, report.passes[1]


def values_of(graph):
    return {name: read_param(graph, param) for name, param in graph.params.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


QUICK = {"layer_tokens": 4 * 1024, "tokens": 4 * 1024, "adapters": 4, "layer_rate": 3e-3, "rate": 3e-3}
LAYERS = {**QUICK, "layer_tokens": 40 * 1024, "tokens": 0}
ENDS = {**QUICK, "layer_tokens": 0, "tokens": 12 * 1024, "adapters": 8, "rate": 2e-2}


def test_a_graph_that_nothing_has_changed_keeps_its_weights():
    graph, entry = healed("llama", Nothing(), Heal(**QUICK))
    assert same(values_of(graph), values_of(graph_of("llama")))
    assert [trial.distance for trial in entry.trials] == [0.0, 0.0, 0.0]
    assert not any(trial.chosen for trial in entry.trials[1:])


@pytest.mark.parametrize("options", [LAYERS, ENDS], ids=["layer by layer", "end to end"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "bert"])
def test_damage_is_healed(name, options):
    _, entry = healed(name, Damage(), Heal(**options))
    before, after = (trial.distance for trial in entry.trials)
    assert after < 0.9 * before
    assert all(number > 0 for rewrite in entry.rewritten for number in rewrite.numbers.values())
    wanted = max(options["tokens"], options["layer_tokens"])
    assert all(0.5 * wanted <= rewrite.numbers["tokens"] <= wanted for rewrite in entry.rewritten)


@pytest.mark.parametrize("rate", [1e-3, 0.9])
@pytest.mark.parametrize("name", ["llama", "qwen3", "bert"])
def test_what_was_not_trained_on_is_never_further_from_the_original(name, rate):
    data = windows(name, count=20)
    graph, entry = healed(name, Damage(), Heal(**{**QUICK, "rate": rate, "layer_rate": rate}), data=data)
    fidelity = Fidelity(graph_of(name), divide(data).held)
    distances = [trial.distance for trial in entry.trials]
    assert fidelity.distance(graph) == pytest.approx(min(distances), rel=1e-6, abs=0)
    undone = [skip for skip in entry.skipped if "undone" in skip.reason]
    assert len(undone) == sum(not trial.chosen for trial in entry.trials[1:])


class Stop(Exception):
    """Raised where a run is to be interrupted."""


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_an_interrupted_run_ends_in_the_same_bytes(saves, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler.calibration.distil.whole, "SAVE_SECONDS", 0.0)
    expected, _ = healed("llama", Damage(), Heal(**QUICK))
    whole, count = Progress.save, 0

    def save(self, name, tensors):
        nonlocal count
        whole(self, name, tensors)
        count += 1
        if count == saves:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Progress, "save", save)
        healed("llama", Damage(), Heal(**QUICK), workdir=tmp_path)
    resumed, entry = healed("llama", Damage(), Heal(**QUICK), workdir=tmp_path)
    assert same(values_of(resumed), values_of(expected))
    assert {rewrite.numbers["tokens"] for rewrite in entry.rewritten} == {4096}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_latent_attention_is_healed_shrunk_rows_and_all(name):
    before = {}

    @dataclass(frozen=True)
    class Note(Pass):
        """Take note of the weights."""

        def run(self, graph, ctx):
            before.update(values_of(graph))

    graph, data = graph_of(name), windows(name, count=200)
    heal = Heal(tokens=0, layer_tokens=32 * 1024, layer_rate=1e-2)
    report = Pipeline([GqaToMla(rank=12, rope_dim=4), Note(), heal]).run(graph, calibration=lambda _: data)
    came, healed = (trial.distance for trial in report.passes[2].trials)
    assert healed < came
    scopes = {rewrite.scope for rewrite in report.passes[2].rewritten}
    for weight, new in values_of(graph).items():
        if weight.endswith("kv_down.weight") and weight.removesuffix(".self_attn.kv_down.weight") in scopes:
            moved = (new - before[weight]).norm(dim=1) / before[weight].norm(dim=1)
            assert (moved > 1e-3).all() and (moved < 1).all()


TOKENS = {
    "dropped": {"keep": 0.5, "score": "key-norm"},
    "without an MLP": {"keep": 0.4, "skip": "mlp"},
}


@pytest.mark.parametrize("options", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("of", ["tokens", "means"])
def test_a_model_of_fewer_tokens_is_healed(of, options):
    heal = Heal(**{**ENDS, "tokens": 3 * 1024, "rate": 2e-3}, where="linear", of=of)
    graph, entry = healed("siglip_text", DropTokens(**options), heal, data=windows("siglip_text", count=40))
    before, after = (trial.distance for trial in entry.trials)
    held = divide(windows("siglip_text", count=40)).held
    own = Fidelity(graph_of("siglip_text"), held, means=of == "means").distance(graph)
    assert after < before
    assert own == pytest.approx(after, rel=1e-5)


def test_means_are_of_vectors():
    with pytest.raises(PassError, match="logits"):
        healed("llama", Damage(), Heal(**QUICK, of="means"))


def test_what_is_tied_stays_tied():
    graph = tiny_llama()
    data = [{"input_ids": torch.randint(0, 32, (1, 16), generator=torch.Generator().manual_seed(i))} for i in range(40)]
    report = Pipeline([Damage(), Heal(where=["head", "attention"], **QUICK)]).run(graph, calibration=lambda _: data)
    (head,) = (param for param in graph.params.values() if param.aliases)
    assert {node.op.name for node in head.users} == {"embedding", "linear"}
    assert head.expr.attr("source") == "spill" and head.expr.type.dtype == head.storage == torch.bfloat16
    reasons = {skip.scope: skip.reason for skip in report.passes[1].skipped}
    assert reasons[head.name] == "is not healed layer by layer: it lies outside of layers"


def test_a_plan_reads_nothing_and_names_the_weights():
    graph = tiny_llama(layers=1)
    graph.sources.clear()
    report = Pipeline([Heal()]).run(graph, planned=True)
    assert report.read_weights and len(report.passes[0].rewritten) == 4


def test_vectors_are_left_alone_and_said():
    graph = tiny_llama(layers=1)
    report = Pipeline([Heal(where=["norm", "mlp"])]).run(graph, planned=True)
    assert {skip.reason for skip in report.passes[0].skipped} == {"is no matrix of floats but f32[16]"}


def test_what_cannot_be_healed_is_refused():
    with pytest.raises(PassError, match="two windows"):
        healed("llama", Damage(), Heal(), data=windows("llama", count=1))
    with pytest.raises(PassError, match="no matrix"):
        Pipeline([Heal(where="norm")]).run(tiny_llama(), planned=True)
    with pytest.raises(SelectorError, match="selects nothing"):
        Pipeline([Heal(where="experts")]).run(tiny_llama(), planned=True)


def test_gradients_flow_through_a_graph_as_through_one_computation():
    graph = graph_of("qwen3")
    inputs = FAMILIES["qwen3"].inputs()
    weights = {param: read_param(graph, param) for param in graph.params.values()}
    trained = [param for param in graph.params.values() if param.name.endswith("q_proj.weight")]
    for param in trained:
        weights[param].requires_grad_()
    found = differentiable(graph, inputs, weights)["logits"]
    assert torch.equal(found.detach(), run(graph, inputs)["logits"])
    direction = torch.randn(weights[trained[0]].shape, generator=torch.Generator().manual_seed(0))
    found.square().sum().backward()
    moved = {**weights, trained[0]: weights[trained[0]].detach() + 1e-3 * direction}
    back = {**weights, trained[0]: weights[trained[0]].detach() - 1e-3 * direction}
    with torch.no_grad():
        ahead, behind = (
            differentiable(graph, inputs, given)["logits"].double().square().sum() for given in (moved, back)
        )
    slope = float((weights[trained[0]].grad * direction).sum())
    assert slope == pytest.approx(float(ahead - behind) / 2e-3, rel=2e-2)


@given(st.integers(1, 400), st.integers(2, 40), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_the_divergence_has_the_gradient_of_autograd(rows, width, seed):
    source = torch.Generator().manual_seed(seed)
    wanted, found = (torch.randn(rows, width, generator=source) for _ in range(2))
    found.requires_grad_()
    expected = torch.nn.functional.kl_div(
        found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    expected.backward()
    value, gradient = divergence(found, wanted)
    assert value == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    assert torch.allclose(gradient, found.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_weight_that_is_scaled_by_a_power_of_two_is_trained_alike(rank):
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for scale in (1.0, 2.0**-30):
        trained = Trained.of(weight * scale, rank, torch.Generator().manual_seed(1))
        adam = Adam([trained], 1e-2, 5)
        while not adam.finished:
            value = trained.value()
            (gradient,) = torch.autograd.grad((value / scale).square().sum(), [value])
            adam.step([gradient])
        results.append(trained.value().detach() / scale)
    assert torch.equal(*results)
    assert results[0].square().sum() < weight.square().sum()


@pytest.mark.parametrize("rank", [0, 3])
def test_gradients_of_factors_are_those_of_autograd(rank):
    source = torch.Generator().manual_seed(0)
    trained = Trained.of(torch.randn(2, 12, 16, generator=source), rank, source)
    factors = [torch.randn(factor.shape, generator=source).requires_grad_() for factor in trained.factors]
    change = factors[0] @ factors[1] if rank else factors[0]
    wanted = torch.randn(2, 12, 16, generator=source)
    ((trained.start + trained.rows * change) * wanted).sum().backward()
    given = Trained(trained.start, trained.rows, tuple(factor.detach() for factor in factors))
    for ours, factor in zip(given.gradients(wanted), factors, strict=True):
        assert torch.allclose(ours, factor.grad, rtol=TOLERANCE, atol=TOLERANCE * float(factor.grad.abs().max()))


@given(st.integers(1, 20), st.integers(0, 70), st.integers(0, 3))
def test_every_window_is_seen_before_any_is_seen_again(count, length, seed):
    found = order(count, length, seed)
    assert len(found) == length
    for start in range(0, length - count + 1, count):
        assert sorted(found[start : start + count]) == list(range(count))


@given(st.integers(2, 300))
def test_windows_are_trained_on_or_held_out(count):
    batches = [{"input_ids": torch.full((1, 4), index)} for index in range(count)]
    found = divide(batches)
    numbers = sorted(int(batch["input_ids"][0, 0]) for batch in (*found.train, *found.held))
    assert numbers == list(range(count))
    assert found.train and 1 <= len(found.held) <= 8


def test_the_original_is_the_graph_before_the_first_pass():
    seen = []

    @dataclass(frozen=True)
    class Look(Pass):
        """Take note of the original."""

        compares: ClassVar = True

        def run(self, graph, ctx):
            seen.append(ctx.original)

    graph, inputs = tiny_llama(), {"input_ids": torch.arange(8)[None]}
    before = run(copy_of(graph), inputs)["logits"]
    Pipeline([Damage(), Look()]).run(graph)
    assert torch.equal(run(seen[0], inputs)["logits"], before)
    assert not torch.equal(run(graph, inputs)["logits"], before)
