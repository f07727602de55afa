"""Pruning of layers, and of attention and MLPs alone: what is left is what the rest computes."""

from __future__ import annotations

import pytest
import torch

from backends.safetensors import emit
from compiler.errors import PassError
from compiler.evaluate import load_model
from compiler.ir.facts import attention_sites, mlp_sites
from compiler.ir.layers import copy_of, layer_of
from compiler.pipeline import Pipeline
from compiler.target import emission_of
from passes.prune import Prune
from passes.prune.depth import blocks_of, take_out
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, Job, distance
from tests.families import FAMILIES
from tests.removed import double, outputs
from tests.test_prune import Pruned, batches, context


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral", "vit"])
@pytest.mark.parametrize("score", ["loss", "influence"])
def test_attention_and_mlps_alone_are_taken_out_and_what_is_left_is_written_as_code(name, score, tmp_path):
    job = Pruned(name, tmp_path, what="sublayers", keep=0.75, score=score, refit=False)
    (entry,) = job.report.passes
    taken = [done.scope for done in entry.rewritten if done.what == "taken out"]
    assert taken and entry.after.parameters < entry.before.parameters
    assert all({"influence" if score == "influence" else "predicted_loss"} == {*e.numbers} for e in entry.rewritten)
    job.out.mkdir()
    emit(emission_of(job.graph, "generated"), job.graph.sources, job.out)
    with torch.no_grad():
        found = load_model(job.out, trust_remote_code=True)(**job.family.inputs())
    assert distance(found, job.outputs()) < TOLERANCE


@pytest.mark.parametrize(("name", "gone"), [("llama", (0, 1)), ("whisper", (0, 1, 4, 5, 6))])
def test_layers_of_code_are_numbered_anew_where_all_parts_of_one_are_gone(name, gone, tmp_path):
    job = Job(name, tmp_path)
    found = blocks_of(job.graph, context(job.graph), ["sublayers"])
    take_out(job.graph, [found[number] for number in gone])
    job.out.mkdir()
    emit(emission_of(job.graph, "generated"), job.graph.sources, job.out)
    with torch.no_grad():
        written = load_model(job.out, trust_remote_code=True)(**job.family.inputs())
    assert distance(written, job.outputs()) < TOLERANCE


def test_a_plan_says_that_it_does_not_know_which_layers_go():
    graph = plan_of("llama")
    (entry,) = Pipeline([Prune(what="layers", keep=0.5)]).run(graph, planned=True).passes
    assert any("is measured when the recipe runs" in text for text in entry.warnings)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sublayer_that_is_taken_out_is_one_that_adds_nothing(name):
    family = FAMILIES[name]
    graph = double(graph_of(family.name))
    step = context(graph)
    found = blocks_of(graph, step, ["sublayers"])
    assert len(found) >= (1 if name in ("gpt_neox", "cohere2") else 2)
    for number in range(len(found)):
        cut, silent = copy_of(graph), copy_of(graph)
        take_out(cut, [blocks_of(cut, step, ["sublayers"])[number]])
        block = blocks_of(silent, step, ["sublayers"])[number]
        added = next(v for v in block.leaves.node.inputs if v is not block.enters)
        nothing = silent.op("mul", [added], {"scalar": 0.0}, scope=added.node.scope, before=block.leaves.node)
        silent.set_input(block.leaves.node, block.leaves.node.inputs.index(added), nothing)
        given = family.inputs(batch=1, tokens=5)
        there = outputs(silent, given)
        for output, tensor in outputs(cut, given).items():
            assert torch.equal(tensor, there[output])


@pytest.mark.parametrize(("what", "keep", "left"), [("layers", 2, 2), ("layers", 3, 3), ("sublayers", 5, 3)])
def test_a_number_says_how_many_layers_remain(what, keep, left):
    graph = graph_of("llama", layers=3)
    Pipeline([Prune(what=what, keep=keep)]).run(graph, calibration=lambda _: batches("llama"))
    assert len({layer_of(node.scope) for node in graph.nodes} - {None}) == left
    assert len(attention_sites(graph)) + len(mlp_sites(graph)) == (keep if what == "sublayers" else 2 * keep)


def test_more_layers_than_there_are_cannot_remain():
    graph = graph_of("llama")
    with pytest.raises(PassError, match="there are 2 to keep, not 3"):
        Pipeline([Prune(what="layers", keep=3)]).run(graph, calibration=lambda _: batches("llama"))
