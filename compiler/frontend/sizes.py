"""Sizes of inputs that a model's config says."""

from __future__ import annotations

from typing import Any

from compiler.ir.graph import Graph


def image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model with ``config`` takes; 3 of 224 by 224 if it says none."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(vision, "num_channels", 3), height, width


def image_size(graph: Graph) -> dict[str, Any]:
    """``image_size`` of a config, as the pictures that ``graph`` takes have it; nothing where it takes none."""
    pixels = graph.inputs.get("pixel_values")
    if pixels is None or pixels.type.rank != 4:
        return {}
    height, width = pixels.shape[2:]
    return {"image_size": height if height == width else [height, width]}
