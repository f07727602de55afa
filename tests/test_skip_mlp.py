"""Tokens that skip the MLP of some layers, and scores of tokens that halt: what others get is what it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backends.onnx import propose
from compiler.errors import PassError, TargetError
from compiler.ir.execute import run
from compiler.ir.facts import flops_per_token
from compiler.ir.graph import Graph, Node
from compiler.ir.text import print_graph
from compiler.ir.types import TensorType
from tests.emitted import TOLERANCE, distance
from tests.families import FAMILIES
from tests.test_drop_tokens import dropped, observed
from tests.test_onnx import error, tolerance, written

PARALLEL = ("gpt_neox", "cohere2", "deepseek_v2", "deepseek_v3")
FAMILIES_WITH_MLP = [name for name in FAMILIES if name not in PARALLEL]
MLP = {"skip": "mlp"}


def mlps(reduced: Graph) -> list[Node]:
    return reduced.nodes_named("token_restore")


def without(graph: Graph, reduced: Graph, values: dict) -> dict[str, Tensor]:
    """Let what each MLP of ``graph`` adds to tokens that skip it in ``reduced`` be nothing."""
    given: dict[str, Tensor] = {}
    for node in mlps(reduced):
        (user,) = node.output.users
        (own,) = [
            n
            for n in graph.nodes
            if n.op.name == "add" and n.scope == user.scope and _place(graph, n) == _place(reduced, user)
        ]
        place = user.inputs.index(node.output)
        made, index = own.input(place), values[node.input(2)]
        kept = torch.zeros(values[node.output].shape[:2]).scatter(1, index, 1.0)[..., None]
        name = f"kept{len(given)}"
        given[name] = kept
        graph.add_input(name, TensorType(torch.float32, (*made.shape[:2], 1)))
        graph.set_input(own, place, graph.op("mul", [made, graph.inputs[name]], scope=own.scope, before=own))
    return given


def _place(graph: Graph, node: Node) -> int:
    return [n for n in graph.nodes if n.op.name == "add" and n.scope == node.scope].index(node)


@pytest.mark.parametrize("name", FAMILIES_WITH_MLP)
def test_what_skips_an_mlp_is_as_if_that_added_nothing(name):
    graph, reduced = dropped(name, keep=0.6, **MLP)
    inputs = FAMILIES[name].inputs(batch=2, tokens=11)
    values, found = observed(reduced, inputs)
    assert len(mlps(reduced)) == 2
    assert all(values[n.input(2)].shape[1] == math.ceil(0.6 * values[n.output].shape[1]) for n in mlps(reduced))
    assert distance(found, run(graph, inputs | without(graph, reduced, values))) <= TOLERANCE


@pytest.mark.parametrize(
    "options", [{"keep": 0.6, "merge": "bipartite"}, {"keep": (0.9, 0.4)}, {"keep": 0.5, "score": "key-norm"}]
)
def test_only_mlps_cost_less(options):
    for name in ("dinov2", "bert", "llama"):
        graph, reduced = dropped(name, **MLP, **options)
        (output, *_) = graph.outputs
        found = run(reduced, FAMILIES[name].inputs(batch=2, tokens=9))
        assert all(value.isfinite().all() for value in found.values())
        assert reduced.outputs[output].type == graph.outputs[output].type
        assert flops_per_token(reduced) < flops_per_token(graph)
        assert [n.input(1).shape for n in reduced.nodes_named("attention")] == [
            n.input(1).shape for n in graph.nodes_named("attention")
        ]


def test_an_onnx_model_skips_the_same(tmp_path):
    for name in ("dinov2", "modernbert"):
        graph, reduced = dropped(name, keep=0.5, **MLP)
        given = FAMILIES[name].inputs(batch=2, tokens=9)
        mask = {"attention_mask": torch.ones_like(given["input_ids"])} if "input_ids" in given else {}
        found = written(reduced, tmp_path / name, "ort-cpu").run(**given, **mask)
        for output, value in run(reduced, given).items():
            assert error(found[output], value) <= tolerance(graph)


@pytest.mark.parametrize("merge", ["none", "bipartite"])
def test_a_sample_skips_in_a_padded_batch_what_it_skips_alone(merge, tmp_path):
    graph, reduced = dropped("bert", depth=3, keep=0.6, merge=merge, **MLP)
    model, (output, *_) = written(reduced, tmp_path), reduced.outputs
    ids = FAMILIES["bert"].inputs(batch=3, tokens=12)["input_ids"]
    lengths, mask = (12, 7, 1), torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, length:], mask[row, length:] = 0, 0
    found = model.run(input_ids=ids, attention_mask=mask)[output]
    for row, length in enumerate(lengths):
        alone = run(reduced, {"input_ids": ids[row : row + 1, :length]})[output]
        assert error(found[row : row + 1, :length], alone) <= tolerance(graph)


@pytest.mark.parametrize("name", ["llama", "bert", "dinov2"])
def test_those_that_moved_least_halt_first(name):
    for site in ("attention", "layer"):
        _, reduced = dropped(name, keep=0.5, layers="0", score="change", site=site, prefix=0, suffix=0)
        values, _ = observed(reduced, FAMILIES[name].inputs(batch=2, tokens=10))
        (chosen,) = reduced.nodes_named("token_select")
        (taken,) = [
            n
            for n in reduced.nodes_named("token_take")
            if n.input(0).type.rank == 3 and n.input(0) in values and n.input(1) is chosen.outputs[0]
        ][:1]
        after = values[taken.input(0)]
        scores = values[chosen.input(0)]
        assert scores.shape == after.shape[:2] and (scores >= 0).all()
        kept = scores.gather(1, values[chosen.outputs[0]]).min(1).values
        assert (kept >= scores.gather(1, values[chosen.outputs[1]]).max(1).values).all()


def test_the_earliest_go_farthest():
    _, reduced = dropped("llama", depth=3, keep=(0.8, 0.5, 0.3), score="earliest", suffix=0)
    values, _ = observed(reduced, FAMILIES["llama"].inputs(batch=2, tokens=10))
    for node in reduced.nodes_named("token_select"):
        index = values[node.outputs[0]]
        assert torch.equal(index, torch.arange(index.shape[1]).expand_as(index))


REFUSED = {
    "behind layers": ("vit", {"keep": 0.5, "site": "layer"}, "behind attention"),
    "counted anew": ("llama", {"keep": 0.5, "positions": "renumber"}, "keep their positions"),
    "one more": ("vit", {"keep": 0.5, "merge": "extra", "score": "class"}, "has no place"),
    "beside attention": ("gpt_neox", {"keep": 0.5}, "no MLP of its own behind its attention"),
}


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_skip_is_refused(name, options, reason):
    with pytest.raises(PassError, match=reason):
        dropped(name, **MLP, **options)


def test_a_model_with_a_cache_is_refused():
    for merge in ("none", "bipartite"):
        _, reduced = dropped("llama", keep=0.6, merge=merge, **MLP)
        with pytest.raises(TargetError, match="go on from a cache"):
            propose(reduced)


def test_all_tokens_through_all_mlps_is_the_model_itself():
    graph, reduced = dropped("bert", keep=1.0, **MLP)
    assert print_graph(graph) == print_graph(reduced)
