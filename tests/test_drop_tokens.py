"""Fewer tokens from a layer on: what remains is what the whole model gives with the others masked from there on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from compiler.errors import PassError
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.ir.facts import flops_per_token
from compiler.ir.graph import Graph, Node
from compiler.ir.layers import copy_of
from compiler.ir.parse import parse_graph
from compiler.ir.text import print_graph
from compiler.ir.types import TensorType
from compiler.pipeline import Pipeline
from passes.drop_tokens import DropTokens
from passes.drop_tokens.counts import counts
from tests.captures import graph_of
from tests.emitted import TOLERANCE, distance
from tests.families import FAMILIES

LATENT = ("deepseek_v2", "deepseek_v3")
WITH_KEYS = [name for name in FAMILIES if name not in LATENT]
CHOICES = ("token_select", "token_match")


def dropped(name: str, depth: int = 2, **options) -> tuple[Graph, Graph]:
    """A family's graph, and the same after the pass."""
    graph = graph_of(name, layers=depth)
    reduced = copy_of(graph)
    reduced.sources = dict(graph.sources)
    Pipeline([DropTokens(**options)]).run(reduced)
    return graph, reduced


def observed(graph: Graph, inputs: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Every computed value, and the outputs."""
    found: dict = {}
    return found, run(graph, inputs, observe=found.__setitem__)


def masked(graph: Graph, reduced: Graph, places: list[Tensor]) -> dict[str, Tensor]:
    """Let every attention of ``graph`` see only the tokens that it has in ``reduced``; ``places`` after each step."""
    step, given = 0, dict[str, Tensor]()
    attentions = iter(graph.nodes_named("attention"))
    for node in reduced.nodes:
        step += node.op.name in CHOICES
        if node.op.name != "attention":
            continue
        whole = next(attentions)
        if node.input(1).shape != whole.input(1).shape:
            batch, tokens = whole.input(1).shape[0], whole.input(1).shape[2]
            name = f"kept{step}"
            if name not in given:
                graph.add_input(name, TensorType(torch.bool, (batch, tokens)))
            given[name] = places[step - 1]
            whole.inputs += [None] * (4 - len(whole.inputs))
            graph.set_input(whole, 3, graph.inputs[name])
    return given


def same_node(graph: Graph, reduced: Graph, node: Node) -> Node:
    """The node of ``graph`` that ``node`` of ``reduced`` was."""

    def alike(other: Graph) -> list[Node]:
        return [each for each in other.nodes if (each.op.name, each.scope) == (node.op.name, node.scope)]

    return alike(graph)[alike(reduced).index(node)]


def composed(reduced: Graph, values: dict) -> list[Tensor]:
    """The places, among all tokens, of those that remain after each step."""
    found: list[Tensor] = []
    for node in reduced.nodes_named(*CHOICES):
        index = values[node.outputs[0]]
        found.append(found[-1].gather(1, index) if found else index)
    return found


@pytest.mark.parametrize("site", ["attention", "layer"])
@pytest.mark.parametrize("name", WITH_KEYS)
def test_what_remains_is_as_if_the_others_were_masked(name, site):
    score = "random" if site == "layer" else "received"
    check_masked(name, *dropped(name, keep=0.6, layers="0", site=site, score=score), (0.6,))


@pytest.mark.parametrize("name", ["dinov2", "bert", "t5"])
def test_what_enters_a_layer_is_as_if_the_others_were_masked(name):
    check_masked(name, *dropped(name, keep=0.6, layers="0", site="entry", score="random"), (0.6,))


@pytest.mark.parametrize("name", ["dinov2", "bert", "modernbert", "gemma3", "t5", "gpt_oss"])
def test_what_remains_of_what_remained_is_as_if_the_others_were_masked(name):
    check_masked(name, *dropped(name, depth=3, keep=(0.7, 0.4), layers="0-1"), (0.7, 0.4))


def check_masked(name: str, graph: Graph, reduced: Graph, keep: tuple[float, ...]) -> None:
    inputs = FAMILIES[name].inputs(batch=2, tokens=11)
    values, _ = observed(reduced, inputs)
    places = composed(reduced, values)
    restore = reduced.nodes_named("token_restore")[0]
    stream = same_node(graph, reduced, restore.input(1).node).output
    tokens = values[reduced.nodes_named("token_restore")[-1].output].shape[1]
    assert [index.shape[1] for index in places] == [math.ceil(part * tokens) for part in keep]
    kept = [torch.zeros(2, tokens, dtype=torch.bool).scatter(1, index, True) for index in places]
    original, _ = observed(graph, inputs | masked(graph, reduced, kept))
    found = values[restore.input(1)]
    expected = original[stream].gather(1, places[-1][..., None].expand_as(found))
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("name", ["vit", "siglip_vision", "bert", "llama", "gemma3", "whisper"])
def test_what_is_dropped_stays_as_it_was(name):
    _, reduced = dropped(name, keep=0.5)
    values, _ = observed(reduced, FAMILIES[name].inputs(batch=2, tokens=9))
    for node in reduced.nodes_named("token_restore"):
        before, after, index = values[node.input(0)], values[node.output], values[node.input(2)]
        gone = torch.ones(before.shape[:2], dtype=torch.bool).scatter(1, index, False)
        assert gone.any() and torch.equal(before[gone], after[gone])


OPTIONS = {
    "one": {"keep": 1, "layers": "0"},
    "one less": {"keep": 8, "layers": "0"},
    "by numbers": {"keep": (9, 5)},
    "by the first": {"keep": 0.5, "score": "class"},
    "by the last": {"keep": 0.5, "score": "last"},
    "by some": {"keep": 0.5, "score": "received", "every": 3},
    "keys": {"keep": 0.5, "score": "key-norm"},
    "in blocks": {"keep": 0.5, "block": 3},
    "recent": {"keep": 0.5, "score": "recency"},
    "ends": {"keep": 0.5, "prefix": 2, "suffix": 3},
    "renumbered": {"keep": 0.5, "positions": "renumber", "site": "layer"},
    "alike": {"keep": 0.6, "merge": "bipartite"},
    "alike, not weighed": {"keep": 0.6, "merge": "bipartite", "proportional": False},
    "alike in the stream": {"keep": 0.6, "merge": "bipartite", "compare": "stream"},
    "least alike": {"keep": 0.6, "score": "similarity"},
}
MERGED = {
    "neighbours": {"keep": 0.4, "merge": "average"},
    "one more": {"keep": 0.5, "merge": "extra", "score": "class"},
}


@pytest.mark.parametrize("options", [*OPTIONS.values(), *MERGED.values()], ids=[*OPTIONS, *MERGED])
@pytest.mark.parametrize("name", ["dinov2", "llama", "modernbert"])
def test_all_choices_compute_and_print(name, options):
    if FAMILIES[name].kind == "text" and options in list(MERGED.values()):
        with pytest.raises(PassError, match="padded"):
            dropped(name, **options)
        return
    if name == "llama" and options.get("score") == "class":
        with pytest.raises(PassError, match="attends to itself alone"):
            dropped(name, **options)
        return
    graph, reduced = dropped(name, **options)
    assert any(node.op.name in ("token_select", "token_match") for node in reduced.nodes)
    found = run(reduced, FAMILIES[name].inputs(batch=2, tokens=9))
    assert all(value.isfinite().all() for value in found.values())
    assert [value.type for value in reduced.outputs.values()] == [value.type for value in graph.outputs.values()]
    text = print_graph(reduced)
    assert print_graph(parse_graph(text)) == text


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_prompts_of_a_few_tokens_keep_the_last(tokens):
    _, reduced = dropped("llama", keep=0.25, score="last")
    values, found = observed(reduced, FAMILIES["llama"].inputs(batch=2, tokens=tokens))
    assert found["logits"].isfinite().all()
    assert all((index[:, -1] == tokens - 1).all() for index in composed(reduced, values))


def test_all_tokens_are_none_dropped():
    for name, options in (("dinov2", {"keep": 10}), ("dinov2", {"keep": (1.0, 10)}), ("llama", {"keep": 1.0})):
        graph, reduced = dropped(name, **options)
        assert print_graph(graph) == print_graph(reduced)


def test_learnt_tokens_remain():
    for name, learnt in (("vit", 1), ("deit", 2), ("dinov2", 1), ("clip_vision", 1), ("siglip_vision", 0)):
        _, reduced = dropped(name, keep=0.5)
        assert {node.attr("prefix") for node in reduced.nodes_named("token_select")} == {learnt}


def test_registers_remain_beside_the_class_token():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
    graph = capture(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=3)).eval())
    given = {"pixel_values": torch.randn(2, 3, 24, 24)}
    Pipeline([DropTokens(keep=0.5, merge="bipartite", compare="stream")]).run(graph)
    values, _ = observed(graph, given)
    assert all((index[:, :4] == torch.arange(4)).all() for index in composed(graph, values))
    assert {node.attr("prefix") for node in graph.nodes_named("token_match")} == {4}


REFUSED = {
    "no layer": ("vit", {"keep": 0.5, "layers": "7"}, "no attention in layer 7"),
    "no range": ("vit", {"keep": 0.5, "layers": "first"}, "like 0-11,20"),
    "a list too short": ("vit", {"keep": (0.5,)}, "behind 1 layers, and there are 2"),
    "growing": ("vit", {"keep": (0.5, 0.9)}, "cannot remain"),
    "growing text": ("bert", {"keep": (3, 6)}, "do not come back"),
    "parts and numbers of text": ("bert", {"keep": (4, 0.5)}, "grows at some lengths"),
    "parts of pairs": ("bert", {"keep": 0.2, "merge": "bipartite"}, "one can go"),
    "pairs of what": ("bert", {"keep": (5, 4), "merge": "bipartite"}, "go by parts"),
    "steps of what": ("llama", {"keep": 4}, "in steps"),
    "latent": ("deepseek_v3", {"keep": 0.5}, "keys of their own"),
    "no pairs by norm": ("vit", {"keep": 0.5, "merge": "bipartite", "score": "key-norm"}, "pairs that are alike"),
    "no pairs by attention": ("vit", {"keep": 0.5, "merge": "bipartite", "score": "received"}, "pairs that are alike"),
    "no weights": ("vit", {"keep": 0.5, "merge": "extra", "score": "random"}, "by attention"),
}


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(name, options, reason):
    with pytest.raises(PassError, match=reason):
        dropped(name, **options)


def test_where_more_should_go_than_have_another_that_is_said():
    reduced = graph_of("vit")
    (entry,) = Pipeline([DropTokens(keep=2, merge="bipartite")]).run(reduced).passes
    assert [rewrite.numbers["after"] for rewrite in entry.rewritten] == [6, 4]
    assert entry.warnings == ["4 tokens remain behind vit.layers.1 and not 2: of each two neighbours one can go"]


def test_arithmetic_counts_for_the_part_that_goes_on():
    graph, reduced = dropped("bert", keep=0.5, layers="0", site="layer")
    layer = sum(2 * p.type.numel for p in graph.params.values() if "layer.1" in p.name and p.type.rank == 2)
    assert flops_per_token(graph) - flops_per_token(reduced) == layer // 2


def test_a_mean_of_some_is_attended_to_as_they_were():
    """Patches of one colour without positions are the same: merging them changes nothing that the class token sees."""
    family = FAMILIES["vit"]
    model = family.build(layers=3)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[:, 1:] = 0
    graph, pixels = capture(model), {"pixel_values": torch.ones(2, 3, 24, 24)}
    expected = run(graph, pixels)
    for merge in ("bipartite", "average"):
        reduced = copy_of(graph)
        reduced.sources = dict(graph.sources)
        Pipeline([DropTokens(keep=0.4, merge=merge)]).run(reduced)
        assert distance(run(reduced, pixels), expected) <= TOLERANCE


def test_tokens_are_dropped_once():
    _, reduced = dropped("vit", keep=0.5)
    with pytest.raises(PassError, match="dropped already"):
        Pipeline([DropTokens(keep=0.4)]).run(reduced)


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 300), keep=st.integers(1, 300), steps=st.integers(1, 12))
def test_steps_end_where_they_should(tokens, keep, steps):
    found = counts(tokens, min(keep, tokens), steps, 1)
    assert found[-1] == min(keep, tokens) and found == sorted(found, reverse=True)
    (part,) = counts("T", keep / 300, 1, 1)
    (known,) = counts(tokens, keep / 300, 1, 1)
    assert run_dim(part, tokens) == known


def run_dim(dim, tokens: int) -> int:
    from compiler.ir.types import resolve_dim

    return resolve_dim(dim, {"T": tokens})


def test_means_of_neighbours_leave_one():
    _, reduced = dropped("vit", keep=0.05, merge="average")
    found = run(reduced, FAMILIES["vit"].inputs(batch=2, tokens=9))
    assert all(value.isfinite().all() for value in found.values())
