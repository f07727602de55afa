"""A gate that learns which tokens matter: nothing before it is trained, never worse on what it was not trained on."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import compiler.calibration.distil.whole
import passes.drop_tokens.learn
from backends.onnx import emit, propose, verify
from compiler.calibration.distil.job import Job
from compiler.calibration.distil.windows import divide
from compiler.calibration.fidelity import Fidelity
from compiler.cli import main
from compiler.errors import PassError
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of
from compiler.ir.stages import after_prompt
from compiler.ir.text import print_graph
from compiler.pipeline import PassReport, Pipeline
from compiler.weights.expr import load
from compiler.weights.spill import Progress
from passes.drop_tokens import DropTokens
from tests.captures import graph_of
from tests.families import FAMILIES
from tests.small import write_folder, write_recipe
from tests.test_drop_prompts import PROMPT, decoded
from tests.test_drop_tokens import check_masked, dropped
from tests.test_generated import written as generated
from tests.test_onnx import error, tolerance, written

KEEP = {"keep": (0.7, 0.4), "layers": "0-1"}


def windows(name: str, count: int = 12, tokens: int = 16) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(FAMILIES[name].inputs(batch=2, tokens=tokens))
    return found


def learned(name: str, workdir=None, **options) -> tuple[Graph, Graph, PassReport]:
    """A family's graph, the same with trained gates, and what the pass reports."""
    graph = graph_of(name, layers=3)
    reduced = copy_of(graph)
    reduced.sources = dict(graph.sources)
    wanted = DropTokens(score="learned", **{**KEEP, "learn": 2048, **options})
    report = Pipeline([wanted]).run(reduced, calibration=lambda _: windows(name), workdir=workdir)
    return graph, reduced, report.passes[0]


def gated(name: str, **options) -> tuple[Graph, Graph]:
    """A family's graph, and the same with gates that say something."""
    graph = graph_of(name, layers=3)
    reduced = copy_of(graph)
    reduced.sources = dict(graph.sources)
    wanted = DropTokens(score="learned", **{**KEEP, **options})
    Pipeline([wanted]).run(reduced, planned=True, calibration=lambda _: [])
    for param in reduced.params.values():
        if param.name.endswith("token_gate.outer.weight"):
            key = reduced.sources["spill"].add(param.name, torch.randn(param.type.static_shape))
            param.expr = load("spill", key, param.expr.type)
    return graph, reduced


@pytest.mark.parametrize("name", ["bert", "dinov2", "llama", "whisper"])
def test_an_untrained_gate_chooses_as_attention_does(name):
    graph = graph_of(name, layers=3)
    outputs: list[dict[str, Tensor]] = []
    for options in ({}, {"score": "learned"}):
        reduced = copy_of(graph)
        reduced.sources = dict(graph.sources)
        Pipeline([DropTokens(**KEEP, **options)]).run(reduced, planned=True, calibration=lambda _: [])
        outputs.append(run(reduced, FAMILIES[name].inputs(batch=2, tokens=11)))
    for output, value in outputs[0].items():
        torch.testing.assert_close(outputs[1][output], value)


@pytest.mark.parametrize("name", ["bert", "dinov2", "llama", "gemma3"])
def test_windows_held_out_are_never_further_from_the_original(name):
    graph, reduced, entry = learned(name)
    plain, trained = (trial.distance for trial in entry.trials)
    found = Fidelity(graph, divide(windows(name)).held).distance(reduced)
    assert found == pytest.approx(min(plain, trained), rel=1e-5)
    assert any("token_gate" in param for param in reduced.params) == (trained < plain)
    assert bool(entry.skipped) == (trained >= plain)


@pytest.fixture
def jobs(monkeypatch):
    """What would train gates, none of which is trained."""
    found: list[Job] = []

    def distil(job, *_):
        found.append(job)
        return {param: param.expr for param in job.params}, 0

    monkeypatch.setattr(passes.drop_tokens.learn, "distil", distil)
    return found


def test_gates_that_are_no_better_are_left_out(jobs):
    _, reduced, entry = learned("bert")
    assert "left out" in entry.skipped[0].reason
    plain = copy_of(graph_of("bert", layers=3))
    Pipeline([DropTokens(**KEEP)]).run(plain)
    assert print_graph(reduced) == print_graph(plain)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_is_measured_without_gates_is_what_is_written_without_them(name, jobs):
    """In blocks means of logarithms, of which gates choose, are not those of attention."""
    for block in (1, 3):
        graph, _, entry = learned(name, block=block)
        plain = copy_of(graph)
        Pipeline([DropTokens(**KEEP, block=block)]).run(plain)
        expected = Fidelity(graph, divide(windows(name)).held).distance(plain)
        assert entry.trials[0].distance == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("keep", [(0.5, 0.5), (0.97, 0.5)])
def test_where_no_token_leaves_what_is_trained_is_the_original(keep, jobs):
    learned("llama", keep=keep)
    (job,) = jobs
    given = FAMILIES["llama"].inputs(batch=2, tokens=2)  # the first and the last remain
    torch.testing.assert_close(run(job.graph, given)["logits"], run(job.original, given)["logits"])


def test_the_command_trains_gates(tmp_path):
    folder = write_folder(tmp_path)
    passes = "[drop-tokens: {score: learned, keep: 50%, layers: '0', learn: 64}]"
    calibration = "calibration: {data: text.txt, samples: 4, length: 16}\n"
    recipe = write_recipe(folder, passes, calibration)
    assert main([str(recipe), "-o", str(tmp_path / "out"), "-q"]) == 0
    (entry,) = json.loads((tmp_path / "out" / "compress" / "report.json").read_text())["passes"]
    assert [trial["what"] for trial in entry["trials"]] == ["by attention alone", "by trained gates"]


class Stop(Exception):
    """Raised where a run is to be interrupted."""


def test_an_interrupted_training_ends_in_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler.calibration.distil.whole, "SAVE_SECONDS", 0.0)
    *_, expected = learned("bert", workdir=tmp_path / "whole")
    whole = Progress.save

    def save(self, name, tensors):
        whole(self, name, tensors)
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Progress, "save", save)
        learned("bert", workdir=tmp_path / "cut")
    *_, resumed = learned("bert", workdir=tmp_path / "cut")
    assert [trial.distance for trial in resumed.trials] == [trial.distance for trial in expected.trials]


@pytest.mark.parametrize("name", ["bert", "dinov2", "modernbert", "t5", "gpt_oss"])
def test_what_remains_is_as_if_the_others_were_masked(name):
    check_masked(name, *gated(name), (0.7, 0.4))


@pytest.mark.parametrize("name", ["bert", "siglip_text"])
def test_a_sample_gives_in_a_padded_batch_what_it_gives_alone(name, tmp_path):
    graph, reduced = gated(name)
    model, (output, *_) = written(reduced, tmp_path), reduced.outputs
    ids = FAMILIES[name].inputs(batch=3, tokens=12)["input_ids"]
    lengths, mask = (12, 7, 1), torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, length:], mask[row, length:] = 0, 0
    found = model.run(input_ids=ids, attention_mask=mask)[output]
    for row, length in enumerate(lengths):
        alone = run(reduced, {"input_ids": ids[row : row + 1, :length]})[output]
        assert error(found[row : row + 1, :length], alone) <= tolerance(graph)


def test_prompts_lose_the_tokens_that_gates_say(tmp_path):
    graph, reduced = gated("llama")
    ids = FAMILIES["llama"].inputs(batch=2, tokens=PROMPT + 4)["input_ids"]
    whole = run(after_prompt(reduced, PROMPT), {"input_ids": ids})["logits"]
    model = written(reduced, tmp_path / "onnx")
    found = torch.cat(decoded(model, ids[:, PROMPT:], ids[:, :PROMPT], torch.ones_like(ids[:, :PROMPT])), 1)
    assert error(found, whole) <= tolerance(graph)
    with torch.no_grad():
        written_code = generated(reduced, tmp_path / "torch")(input_ids=ids[:, :PROMPT])
    assert error(written_code.logits, run(reduced, {"input_ids": ids[:, :PROMPT]})["logits"]) <= tolerance(graph)


def test_pictures_lose_the_tokens_that_gates_say(tmp_path):
    graph, reduced = gated("dinov2")
    emission = propose(reduced)
    emit(emission, reduced.sources, tmp_path)
    assert verify(emission, tmp_path).holds
    given = FAMILIES["dinov2"].inputs(batch=2)
    with torch.no_grad():
        found = generated(reduced, tmp_path / "torch")(**given)
    for output, value in run(reduced, given).items():
        assert error(found[output], value) <= tolerance(graph)


@pytest.mark.parametrize("options", [{"tokens": "pictures"}, {"skip": "mlp"}])
def test_gates_are_of_layers(options):
    with pytest.raises(PassError, match="leave layers"):
        DropTokens(keep=0.5, score="learned", **options)


def test_all_tokens_need_no_gate():
    graph, reduced = dropped("llama", score="learned", keep=1.0)
    assert print_graph(graph) == print_graph(reduced)
