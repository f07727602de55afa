"""Models that read pictures in a text: their graphs, and what they lose with the tokens of pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backends.onnx import propose
from compiler.errors import CaptureError, PassError, TargetError
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.parse import parse_graph
from compiler.ir.text import print_graph
from compiler.pipeline import Pipeline
from passes.drop_tokens import DropTokens
from tests.emitted import TOLERANCE
from tests.test_drop_tokens import composed, masked, observed, same_node
from tests.test_onnx import error, tolerance, written
from tests.vision_language import PICTURE, TOWERS, graph_of_llava, llava, prompts


@pytest.mark.parametrize("tower", TOWERS)
def test_pictures_take_their_places_in_texts_of_any_number_and_length(tower):
    graph, model = graph_of_llava(tower), llava(tower)
    for batch, tokens in ((2, 15), (3, 21), (1, 10)):
        given = prompts(batch, tokens, seed=batch)
        with torch.no_grad():
            wanted = model(**given)
        for name, found in run(graph, given).items():
            assert (found - wanted[name]).abs().max() <= TOLERANCE * wanted[name].abs().max()
    text = print_graph(graph)
    assert print_graph(parse_graph(text)) == text


@pytest.mark.parametrize("tower", TOWERS)
def test_a_checkpoint_is_captured_as_its_model_is(tower, tmp_path):
    llava(tower).save_pretrained(tmp_path)
    graph, given = capture(tmp_path, inputs=prompts(2, 15)), prompts(3, 21, seed=1)
    wanted = run(graph_of_llava(tower), given)
    for name, found in run(graph, given).items():
        assert (found - wanted[name]).abs().max() <= TOLERANCE * wanted[name].abs().max()


class First(nn.Module):
    """Gives the first sample alone, or the first ones joined."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.map = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second, *_ = self.map(x).unbind()
        return torch.cat([second, first]) if self.joined else first


@pytest.mark.parametrize("joined", [True, False])
def test_some_samples_of_a_batch_are_no_batch(joined):
    with pytest.raises(CaptureError):
        capture(First(joined).eval(), inputs={"x": torch.randn(2, 3, 4)})


def dropped(**options: object) -> tuple[Graph, Graph]:
    graph, reduced = graph_of_llava("clip"), graph_of_llava("clip")
    Pipeline([DropTokens(stack="language_model", tokens="pictures", **options)]).run(reduced)
    return graph, reduced


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize(("site", "score"), [("attention", "last"), ("layer", "received")])
def test_only_tokens_of_pictures_go(site, score, positions):
    """FastV and PyramidDrop: behind each layer so many of a picture's nine tokens remain, and all of the text."""
    _, reduced = dropped(keep=(6, 2), layers="0-1", site=site, score=score, positions=positions)
    given = prompts(3, 14)
    values, found = observed(reduced, given)
    assert found["logits"].shape == (3, 14, 64) and found["logits"].isfinite().all()
    pictured = given["input_ids"] == PICTURE
    for index, left in zip(composed(reduced, values), (6, 2), strict=True):
        kept = torch.zeros(3, 14, dtype=torch.bool).scatter(1, index, True)
        assert (kept | pictured).all()
        assert (kept & pictured).sum(1).tolist() == [left] * 3


def test_what_remains_of_a_picture_is_as_if_the_rest_were_masked():
    graph, reduced = dropped(keep=4, layers="0", site="layer", score="last")
    given = prompts(2, 15)
    values, _ = observed(reduced, given)
    (index,) = composed(reduced, values)
    restore = reduced.nodes_named("token_restore")[0]
    kept = torch.zeros(2, 15, dtype=torch.bool).scatter(1, index, True)
    original, _ = observed(graph, given | masked(graph, reduced, [kept]))
    found, stream = values[restore.input(1)], same_node(graph, reduced, restore.input(1).node).output
    expected = original[stream].gather(1, index[..., None].expand_as(found))
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_pictures_of_texts_skip_mlps():
    _, reduced = dropped(keep=3, skip="mlp", score="last")
    values, found = observed(reduced, prompts(2, 15))
    assert found["logits"].isfinite().all()
    assert {values[node.outputs[0]].shape[1] for node in reduced.nodes_named("token_select")} == {9}


@pytest.mark.parametrize("options", [{"score": "class"}, {"merge": "bipartite"}, {"merge": "average"}])
def test_a_tower_loses_tokens_before_its_pictures_take_their_places(options):
    graph, reduced = graph_of_llava("clip"), graph_of_llava("clip")
    Pipeline([DropTokens(stack="vision_tower", keep=0.6, **options)]).run(reduced)
    given = prompts(2, 15)
    found, wanted = run(reduced, given), run(graph, given)
    assert all(found[name].shape == wanted[name].shape and found[name].isfinite().all() for name in wanted)
    assert {node.op.name for node in reduced.nodes} > {"token_restore"}


REFUSED = {
    "no pictures": (DropTokens(stack="vision_tower", tokens="pictures", keep=0.5), "are those of pictures"),
    "no stack": (DropTokens(stack="projector", keep=0.5), "names 0 of the stacks"),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_go_is_refused(options, reason):
    with pytest.raises(PassError, match=reason):
        Pipeline([options]).run(graph_of_llava("clip"))


def test_only_scores_choose_among_pictures():
    with pytest.raises(PassError, match="by score"):
        DropTokens(tokens="pictures", merge="bipartite", keep=0.5)


def test_an_onnx_model_reads_pictures_in_texts(tmp_path):
    for options in ({}, {"merge": "bipartite"}):
        graph, given = graph_of_llava("clip"), prompts(2, 15)
        Pipeline([DropTokens(stack="vision_tower", keep=0.6 if options else 1.0, **options)]).run(graph)
        mask = torch.ones_like(given["input_ids"])
        found = written(graph, tmp_path / str(len(options))).run(**given, attention_mask=mask)
        for name, value in run(graph, given).items():
            assert error(found[name], value) <= tolerance(graph)


def test_an_onnx_model_of_prompts_that_may_have_no_picture_is_refused():
    _, reduced = dropped(keep=4, layers="0", score="last")
    with pytest.raises(TargetError, match="shorter"):
        propose(reduced)
