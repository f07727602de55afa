"""Tiny random towers that read pictures as patches in a row, of any grid, as Qwen-VL's do."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLConfig, Qwen2VLModel, Qwen3VLConfig, Qwen3VLModel

from compiler.frontend import capture
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of

GRID = (1, 4, 6)
PATCHES, VALUES = 24, 3 * 2 * 8 * 8
_SHARED = {"depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2}
_NARROW = {"intermediate_size": 64, "out_hidden_size": 32}
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
_TEXT |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "qwen2_vl": lambda: Qwen2VLModel(Qwen2VLConfig(vision_config=_SHARED | {"embed_dim": 32}, text_config=_TEXT)),
    "qwen2_5_vl": lambda: Qwen2_5_VLModel(
        Qwen2_5_VLConfig(
            vision_config=_SHARED | _NARROW | {"window_size": 32, "fullatt_block_indexes": [0, 2]}, text_config=_TEXT
        )
    ),
    "qwen3_vl": lambda: Qwen3VLModel(
        Qwen3VLConfig(
            vision_config=_SHARED | _NARROW | {"num_position_embeddings": 64, "deepstack_visual_indexes": [1]},
            text_config=_TEXT,
        )
    ),
}


@cache
def whole(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def tower(name: str) -> nn.Module:
    return whole(name).get_submodule("visual")


def patches(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Those of so many pictures, one behind the other."""
    return {"hidden_states": torch.randn(count * PATCHES, VALUES, generator=torch.Generator().manual_seed(seed))}


def grids(count: int) -> dict[str, Tensor]:
    return {"grid_thw": torch.tensor([GRID] * count)}


@cache
def _captured(name: str) -> Graph:
    return capture(tower(name), inputs=patches(1) | grids(1))


def graph_of_tower(name: str) -> Graph:
    """A copy of its graph."""
    graph = copy_of(_captured(name))
    graph.sources = dict(_captured(name).sources)
    return graph
