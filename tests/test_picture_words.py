"""Patches of pictures that are the same word become one token, behind one layer, as many in every picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compiler.errors import PassError
from compiler.ir.execute import read_param, run
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of
from compiler.ir.text import print_graph
from compiler.pipeline import Pipeline
from passes.drop_tokens import DropTokens
from tests.captures import graph_of
from tests.families import FAMILIES
from tests.test_drop_tokens import observed
from tests.test_generated import written as generated
from tests.test_onnx import error, tolerance, written

ENTRY = {"merge": "words", "compare": "stream", "site": "entry", "layers": "0", "keep": 6}
"""Of DINOv2's class token and nine patches, so the vocabulary has five words."""


def pictures(count: int = 6) -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    return [FAMILIES["dinov2"].inputs(batch=2) for _ in range(count)]


def worded(name: str = "dinov2", planned: bool = False, **options: object) -> Graph:
    graph = copy_of(graph_of(name))
    graph.sources = dict(graph_of(name).sources)
    step = DropTokens(**(ENTRY | options))
    Pipeline([step]).run(graph, planned=planned, calibration=lambda _: pictures())
    return graph


@pytest.mark.parametrize("options", [{}, {"site": "attention", "compare": "keys"}], ids=["before", "behind attention"])
def test_those_most_like_their_words_go_into_the_first_of_these(options):
    graph = worded(**options)
    values, _ = observed(graph, pictures()[0])
    (choice,), (merge,) = graph.nodes_named("token_select"), graph.nodes_named("token_merge")
    metric = next(node.input(0) for node in graph.nodes_named("sub") if node.scope.endswith("token_words"))
    mean, vocabulary = (
        read_param(graph, next(param for own, param in graph.params.items() if own.endswith(f"token_words.{name}")))
        for name in ("mean", "vocabulary")
    )
    torch.testing.assert_close(vocabulary.norm(dim=1), torch.ones(5))
    likeness = F.normalize(values[metric] - mean, dim=-1) @ vocabulary.T
    near, word = likeness.max(-1)
    stream = values[merge.input(0)]
    for row in range(2):
        firsts = {int(word[row, place]): place for place in range(9, 0, -1)}
        again = [place for place in range(1, 10) if firsts[int(word[row, place])] != place]
        gone = sorted(sorted(again, key=lambda place: -float(near[row, place]))[:4])
        assert values[choice.outputs[1]][row].tolist() == gone
        kept = [place for place in range(10) if place not in gone]
        assert values[choice.outputs[0]][row].tolist() == kept
        for slot, place in enumerate(kept):
            same = [place, *(other for other in gone if firsts[int(word[row, other])] == place)]
            torch.testing.assert_close(values[merge.outputs[0]][row, slot], stream[row, same].mean(0))


def test_a_plan_has_the_same_graph():
    assert print_graph(worded(planned=True)) == print_graph(worded())


def test_words_are_those_of_the_data():
    """Each patch of one of two colours: both are words, and what remains are one patch of each, and the class token."""
    graph = copy_of(graph_of("dinov2"))
    graph.sources = dict(graph_of("dinov2").sources)
    torch.manual_seed(0)
    colours = torch.randn(2, 3, 1, 1)
    data = []
    for _ in range(16):
        of = torch.randint(0, 2, (1, 1, 3, 3)).repeat_interleave(8, 2).repeat_interleave(8, 3)
        data.append({"pixel_values": torch.where(of == 0, colours[0], colours[1])})
    Pipeline([DropTokens(**(ENTRY | {"keep": 3}))]).run(graph, calibration=lambda _: data)
    values, _ = observed(graph, data[0])
    (merge,) = graph.nodes_named("token_merge")
    slots = torch.cat((values[merge.input(2)], values[merge.input(2)].gather(1, values[merge.input(4)])), 1)
    places = torch.cat((values[merge.input(2)], values[merge.input(3)]), 1)
    patches = data[0]["pixel_values"][:, 0, ::8, ::8].reshape(-1)
    groups = {int(place): int(first) for place, first in zip(places[0], slots[0], strict=True)}
    assert all(patches[place - 1] == patches[groups[place] - 1] for place in range(1, 10))


def test_onnx_models_and_generated_modules_merge_the_same(tmp_path):
    graph, given = worded(), pictures()[1]
    wanted = run(graph, given)
    found = written(graph, tmp_path / "onnx").run(**given)
    model = generated(graph, tmp_path / "module")
    with torch.no_grad():
        made = model(**given)
    for name, value in wanted.items():
        assert error(found[name], value) <= tolerance(graph)
        assert error(made[name], value) <= tolerance(graph)


REFUSED = {
    "texts": ("bert", {}, "may be padded"),
    "several layers": ("dinov2", {"layers": "0-1"}, "behind one layer"),
}


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_words_is_refused(name, options, reason):
    with pytest.raises(PassError, match=reason):
        worded(name, **options)


def test_words_are_found_in_data():
    graph = copy_of(graph_of("dinov2"))
    graph.sources = dict(graph_of("dinov2").sources)
    with pytest.raises(PassError, match="no calibration pictures"):
        Pipeline([DropTokens(**ENTRY)]).run(graph, calibration=lambda _: [])


def test_one_picture_has_no_words():
    """It is its own mean."""
    graph = copy_of(graph_of("dinov2"))
    graph.sources = dict(graph_of("dinov2").sources)
    one = FAMILIES["dinov2"].inputs(batch=1)
    with pytest.raises(PassError, match="differ from the mean of 1 pictures"):
        Pipeline([DropTokens(**ENTRY)]).run(graph, calibration=lambda _: [one])
