"""Several pictures of a text, one of the whole and crops of it: what each keeps by what the whole attends to."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compiler.errors import PassError
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of
from compiler.pipeline import Pipeline
from passes.drop_tokens import DropTokens
from tests.emitted import TOLERANCE
from tests.test_drop_tokens import masked, observed, same_node
from tests.test_onnx import error, tolerance, written
from tests.vision_language import PICTURE, graph_of_llava, llava, with_crops

CROPS = (1, 2)
PICTURES, TOKENS = 3, 9


@cache
def captured() -> Graph:
    return capture(llava("clip"), inputs=with_crops(1, 30, PICTURES))


def dropped(**options: object) -> tuple[Graph, Graph]:
    found = []
    for _ in range(2):
        found.append(copy_of(captured()))
        found[-1].sources = dict(captured().sources)
    where = {"stack": "language_model", "tokens": "pictures", "score": "class", "site": "entry", "layers": "0"}
    Pipeline([DropTokens(**(where | {"crops": CROPS} | options))]).run(found[1])
    return found[0], found[1]


def kept(index: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Which tokens of pictures remain, bool [B, P, N]."""
    flags = torch.zeros(given["input_ids"].shape, dtype=torch.bool).scatter(1, index, True)
    pictured = given["input_ids"] == PICTURE
    assert (flags | pictured).all()
    return flags[pictured].reshape(-1, PICTURES, TOKENS)


def class_attention(given: dict[str, Tensor]) -> Tensor:
    """What class tokens pay to the tokens of their pictures in the last layer that is used, [B, P, N]."""
    tower = llava("clip").model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        found = tower(given["pixel_values"], output_attentions=True).attentions[-2]
    return found.mean(1)[:, 0, 1:].reshape(-1, PICTURES, TOKENS)


def test_texts_of_several_pictures_are_captured():
    for batch, tokens in ((3, 31), (1, 40)):
        given = with_crops(batch, tokens, PICTURES, seed=batch)
        with torch.no_grad():
            wanted = llava("clip")(**given).logits
        assert (run(captured(), given)["logits"] - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("keep", [2, 11, 26, (20, 7)])
def test_each_picture_keeps_what_the_whole_one_says(keep):
    """The n-th token of a picture of weight w has priority w / (n - 1/2), found here one after the other."""
    _, reduced = dropped(keep=keep, layers="0" if isinstance(keep, int) else "0-1")
    given = with_crops(3, 33, PICTURES, seed=7)
    values, _ = observed(reduced, given)
    attention = class_attention(given)
    whole = attention[:, 0].reshape(3, 1, 3, 3)
    seen = F.interpolate(whole, size=(3, 6), mode="bilinear").reshape(3, 3, 2, 3).transpose(1, 2).reshape(3, 2, TOKENS)
    looked = seen.sum(2)
    weights = torch.cat((torch.ones(3, 1), 0.5 + looked / looked.sum(1, keepdim=True)), 1)
    inside = F.normalize(attention[:, 1:], dim=-1) + F.normalize(seen, dim=-1)
    orders = torch.cat((attention[:, :1], inside), 1).argsort(dim=2, descending=True)
    index = torch.arange(33).expand(3, -1)
    counts = [keep] if isinstance(keep, int) else keep
    for node, count in zip(reduced.nodes_named("token_select"), counts, strict=True):
        index = index.gather(1, values[node.outputs[0]])
        found = kept(index, given)
        for row in range(3):
            taken = [0] * PICTURES
            for _ in range(count):
                free = [picture for picture in range(PICTURES) if taken[picture] < TOKENS]
                taken[max(free, key=lambda picture: float(weights[row, picture]) / (taken[picture] + 0.5))] += 1
            assert found[row].sum(1).tolist() == taken and sum(taken) == count
            for picture, number in enumerate(taken):
                assert set(found[row, picture].nonzero()[:, 0].tolist()) == set(orders[row, picture, :number].tolist())


@pytest.mark.parametrize("site", ["entry", "layer"])
def test_what_remains_is_as_if_the_rest_were_masked(site):
    graph, reduced = dropped(keep=10, site=site)
    given = with_crops(2, 31, PICTURES)
    values, _ = observed(reduced, given)
    (choice,), restore = reduced.nodes_named("token_select"), reduced.nodes_named("token_restore")[0]
    index = values[choice.outputs[0]]
    remains = torch.zeros(2, 31, dtype=torch.bool).scatter(1, index, True)
    original, _ = observed(graph, given | masked(graph, reduced, [remains]))
    found, stream = values[restore.input(1)], same_node(graph, reduced, restore.input(1).node).output
    expected = original[stream].gather(1, index[..., None].expand_as(found))
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_a_text_keeps_alone_what_it_keeps_beside_others():
    _, reduced = dropped(keep=0.4)
    given = with_crops(3, 31, PICTURES, seed=4)
    together = run(reduced, given)["logits"]
    for row in range(3):
        alone = {
            "input_ids": given["input_ids"][row : row + 1],
            "pixel_values": given["pixel_values"][row * PICTURES : (row + 1) * PICTURES],
        }
        assert (run(reduced, alone)["logits"][0] - together[row]).abs().max() <= TOLERANCE * together.abs().max()


def test_without_crops_tokens_of_all_pictures_compete():
    _, reduced = dropped(keep=8, crops=())
    given = with_crops(2, 31, PICTURES)
    values, _ = observed(reduced, given)
    (choice,) = reduced.nodes_named("token_select")
    best = class_attention(given).reshape(2, -1).topk(8).indices
    wanted = torch.zeros(2, PICTURES * TOKENS, dtype=torch.bool).scatter(1, best, True)
    assert torch.equal(kept(values[choice.outputs[0]], given).reshape(2, -1), wanted)


def test_other_numbers_of_crops_are_refused():
    with pytest.raises(PassError, match="3 pictures and not one and 4 crops"):
        dropped(keep=5, crops=(2, 2))
    with pytest.raises(PassError, match="rows and columns"):
        DropTokens(tokens="pictures", score="class", crops=(3,), keep=5)


def test_pictures_without_a_class_token_have_no_such_score():
    with pytest.raises(PassError, match="no class token"):
        Pipeline([DropTokens(stack="language_model", tokens="pictures", score="class", keep=4)]).run(
            graph_of_llava("siglip")
        )


@pytest.mark.parametrize("options", [{}, {"score": "key-norm"}, {"merge": "bipartite"}, {"merge": "extra"}])
def test_before_a_layer_its_attention_is_not_known(options):
    with pytest.raises(PassError, match="attention is not known"):
        DropTokens(site="entry", keep=0.5, **options)


def test_an_onnx_model_reads_several_pictures_of_a_text(tmp_path):
    graph, given = captured(), with_crops(2, 31, PICTURES)
    found = written(graph, tmp_path).run(**given, attention_mask=torch.ones_like(given["input_ids"]))
    for name, value in run(graph, given).items():
        assert error(found[name], value) <= tolerance(graph)
