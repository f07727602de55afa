"""Towers of Qwen-VL's layout, captured for pictures of one grid, and what they lose with tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids

from compiler.errors import CaptureError, PassError
from compiler.frontend import capture
from compiler.ir.execute import run, to_torch
from compiler.ir.parse import parse_graph
from compiler.ir.text import print_graph
from compiler.pipeline import Pipeline
from passes.drop_tokens import DropTokens
from tests.emitted import TOLERANCE
from tests.test_drop_tokens import composed, masked, observed, same_node
from tests.test_onnx import error, tolerance, written
from tests.vision_grids import GRID, MODELS, PATCHES, VALUES, graph_of_tower, grids, patches, tower, whole


@pytest.mark.parametrize("name", MODELS)
def test_pictures_of_one_grid_give_what_the_tower_gives(name):
    graph, given = graph_of_tower(name), patches(3, seed=1)
    with torch.no_grad():
        wanted = tower(name)(**given, **grids(3))
    found = run(graph, given)
    assert (found["last_hidden_state"] - wanted.last_hidden_state).abs().max() <= TOLERANCE
    assert (found["pooler_output"] - wanted.pooler_output).abs().max() <= TOLERANCE
    assert print_graph(parse_graph(print_graph(graph))) == print_graph(graph)
    lowered = to_torch(graph)(**given)
    assert all(torch.equal(lowered[key], value) for key, value in found.items())


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_what_remains_in_a_tower_is_as_if_the_rest_were_masked(name):
    graph, reduced, given = graph_of_tower(name), graph_of_tower(name), patches(2)
    Pipeline([DropTokens(keep=0.5, layers="0")]).run(reduced)
    values, found = observed(reduced, given)
    (index,) = composed(reduced, values)
    assert index.shape == (2, PATCHES // 2)
    kept = torch.zeros(2, PATCHES, dtype=torch.bool).scatter(1, index, True)
    original, _ = observed(graph, given | masked(graph, reduced, [kept]))
    restore = reduced.nodes_named("token_restore")[-1]
    mine, stream = values[restore.input(1)], same_node(graph, reduced, restore.input(1).node).output
    expected = original[stream].gather(1, index[..., None].expand_as(mine))
    assert (mine - expected).abs().max() <= TOLERANCE * expected.abs().max()
    alone = run(reduced, {"hidden_states": given["hidden_states"][:PATCHES]})
    together = found["pooler_output"][: len(alone["pooler_output"])]
    assert (alone["pooler_output"] - together).abs().max() <= TOLERANCE * together.abs().max()


def test_where_blocks_attend_within_windows_only_the_last_others_lose_tokens():
    with pytest.raises(PassError, match="needs every token"):
        Pipeline([DropTokens(keep=0.5, layers="0")]).run(graph_of_tower("qwen2_5_vl"))
    reduced = graph_of_tower("qwen2_5_vl")
    Pipeline([DropTokens(keep=0.5, layers="2")]).run(reduced)
    assert all(value.isfinite().all() for value in run(reduced, patches(2)).values())
    assert reduced.nodes_named("token_restore")


def test_an_onnx_model_of_a_tower_merges_tokens(tmp_path):
    graph, given = graph_of_tower("qwen2_vl"), patches(3)
    Pipeline([DropTokens(keep=0.6, merge="bipartite")]).run(graph)
    found = written(graph, tmp_path).run(**given)
    for name, value in run(graph, given).items():
        assert error(found[name], value) <= tolerance(graph)


def test_whole_models_say_what_to_capture_instead():
    with pytest.raises(CaptureError, match="by what is in the text") as refused:
        capture(whole("qwen2_vl"), inputs={"input_ids": torch.zeros(1, 9), "image_grid_thw": torch.tensor([GRID])})
    assert "visual" in refused.value.remedy


def test_grids_must_be_known_and_alike():
    two = torch.tensor([GRID, (1, 2, 12)])
    with pytest.raises(CaptureError, match="of one grid"):
        capture(tower("qwen2_vl"), inputs=patches(2) | {"grid_thw": two})
    with pytest.raises(CaptureError, match="24 patches each"):
        capture(tower("qwen2_vl"), inputs={"hidden_states": torch.randn(7, VALUES), **grids(1)})


@pytest.mark.parametrize("grid", [torch.zeros(0, 3), torch.tensor([[4, 6]]), torch.tensor([[1, 3, 8]])], ids=str)
def test_grids_that_are_none_say_what_they_must_be(grid):
    with pytest.raises(CaptureError) as refused:
        capture(tower("qwen2_vl"), inputs={"hidden_states": torch.randn(24, VALUES), "grid_thw": grid.long()})
    assert refused.value.remedy


class Own(nn.Module):
    """A tower whose places are not those of Qwen's layout."""

    spatial_merge_size = 2

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        return hidden_states + get_vision_position_ids(grid_thw, 1).sum(1, keepdim=True)


def test_a_tower_with_places_of_its_own_is_refused():
    with pytest.raises(CaptureError, match="no tower whose grids are understood") as refused:
        capture(Own().eval(), inputs={"hidden_states": torch.randn(24, VALUES), **grids(1)})
    assert refused.value.remedy
