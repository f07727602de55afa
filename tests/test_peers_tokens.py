"""The plain implementation of published token merging that the benchmark compares with."""

import torch
from transformers import Dinov2Config, Dinov2Model

from benchmarks.peers_tokens import tome
from benchmarks.tokens import left


def model() -> Dinov2Model:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "image_size": 24, "patch_size": 8}
    return Dinov2Model(Dinov2Config(**sizes)).eval()


def test_merging_none_is_the_model():
    ours, pixels = model(), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = ours(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(tome(ours, 0)(pixels), expected, rtol=1e-5, atol=1e-5)


def test_a_picture_of_one_colour_stays_what_it_is():
    """Without positions all its patches are the same, so means of some, attended to as that many, change nothing."""
    ours, pixels = model(), torch.ones(2, 3, 24, 24)
    with torch.no_grad():
        ours.embeddings.position_embeddings[:, 1:] = 0
        expected = ours(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(tome(ours, 2)(pixels), expected, rtol=1e-5, atol=1e-5)


def test_as_many_remain_as_have_another_to_go_into():
    assert left(65, 5, 12) == (60, 55, 50, 45, 40, 35, 30, 25, 20, 15, 10, 6)
    assert left(4, 9, 3) == (3, 2, 2)
