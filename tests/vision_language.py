"""Tiny random models that read pictures in a text, as LLaVA does."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from compiler.frontend import capture
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of

PICTURE, WORDS = 60, 50
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWERS = {
    "clip": (CLIPVisionConfig(**_SIZES, image_size=24, patch_size=8, projection_dim=16), "default"),
    "siglip": (SiglipVisionConfig(**_SIZES, image_size=24, patch_size=8, vision_use_head=False), "full"),
    "siglip with a head": (SiglipVisionConfig(**_SIZES, image_size=24, patch_size=8), "full"),
}


@cache
def llava(tower: str) -> PreTrainedModel:
    """A model whose pictures are nine tokens each; ``clip`` leaves out the class token."""
    vision, strategy = TOWERS[tower]
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_SIZES, num_key_value_heads=2, vocab_size=64),
        image_token_index=PICTURE,
        vision_feature_select_strategy=strategy,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def prompts(batch: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Texts with a picture, at another place in each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (batch, tokens), generator=generator)
    for row in range(batch):
        first = 1 + row % max(1, tokens - 10)
        ids[row, first : first + 9] = PICTURE
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 24, 24, generator=generator)}


@cache
def _captured(tower: str) -> Graph:
    return capture(llava(tower), inputs=prompts(2, 15))


def graph_of_llava(tower: str) -> Graph:
    """A copy of its graph."""
    graph = copy_of(_captured(tower))
    graph.sources = dict(_captured(tower).sources)
    return graph


def with_crops(batch: int, tokens: int, pictures: int, seed: int = 0) -> dict[str, Tensor]:
    """Texts with so many pictures each, one behind the other."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (batch, tokens), generator=generator)
    for row in range(batch):
        ids[row, 1 + row : 1 + row + 9 * pictures] = PICTURE
    return {"input_ids": ids, "pixel_values": torch.randn(batch * pictures, 3, 24, 24, generator=generator)}
