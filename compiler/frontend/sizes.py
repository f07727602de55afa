"""What a model takes, and of which sizes, by its class and config."""

from __future__ import annotations

from typing import Any


def image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model with ``config`` takes; 3 of 224 by 224 if it says none."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(vision, "num_channels", 3), height, width


def input_names(model: Any) -> list[str]:
    """The main input of a model of transformers, and pictures beside it where it compares these with texts (CLIP).

    A model that generates text from pictures takes texts alone as well.
    """
    main: str = model.main_input_name
    towers = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")
    both = main == "input_ids" and towers and not model.can_generate()
    return [main, "pixel_values"] if both else [main]


def feature_shape(config: Any) -> tuple[int, int]:
    """Bands and frames of the audio features that a model takes; its first convolutions halve the frames."""
    return config.num_mel_bins, 2 * config.max_source_positions
