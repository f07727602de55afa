"""Pictures in image files (PNG, JPEG and the like) as what a model of pictures takes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compiler.datafiles import image_files
from compiler.errors import MISSHAPEN, DataError
from compiler.evaluate.images import MEAN, SPREAD, Size
from compiler.evaluate.loading import quiet

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
"""What is read, whatever a file is called: others run programs, or read other files."""
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
MOST_PIXELS = 64 * 2**20
"""A file that claims to be larger is refused before it is unpacked."""


def photographs(model: str | Path, data: Path, samples: int, seed: int, size: Size | None, usual: Size) -> list[Tensor]:
    """``samples`` of the pictures below ``data``, those that ``seed`` picks, each float32 [1, 3, height, width].

    They are made as ``preprocessor_config.json`` beside ``model`` says. Without it the shorter side is resized to
    ``size``, or without one to the ``usual``, its middle cut out, and the mean and spread are those of ImageNet.
    Raises DataError where there are too few, where a file is no picture, and where they come out of another size than
    ``size``.
    """
    return pictures_of(model, picked_files(image_files(data), data, samples, seed), size, usual)


def picked_files(files: Sequence[Path], data: Path, samples: int, seed: int, what: str = "pictures") -> list[Path]:
    """``samples`` of ``files``, which lie below ``data`` and are ``what``. Raises DataError where there are fewer."""
    if len(files) < samples:
        raise DataError(
            f"there are {len(files)} {what} where {samples} are asked for",
            remedy=f"write `samples: {len(files)}`, or add pictures",
            where=str(data),
            option="samples",
        )
    return [files[index] for index in sorted(random.Random(seed).sample(range(len(files)), samples))]


def pictures_of(model: str | Path, files: Sequence[Path], size: Size | None, usual: Size) -> list[Tensor]:
    """The pictures in ``files``, as ``photographs`` makes them."""
    processor = _processor(model)
    made = [_made(processor, _opened(path), size or usual) for path in files]
    if size is not None:
        _check_sizes(made, size, str(model))
    return made


def _check_sizes(pictures: Sequence[Tensor], size: Size, model: str) -> None:
    for pixels in pictures:
        height, width = pixels.shape[2:]
        if (height, width) != size:
            raise DataError(
                f"pictures are made {height} x {width}, as `preprocessor_config.json` says, where the model takes "
                f"{size[0]} x {size[1]}",
                where=model,
                remedy=f"write `inputs: {{image: {height}}}` in the recipe",
            )


def _processor(model: str | Path) -> Any:
    """What makes pictures for the model; None where nothing beside it says how."""
    import transformers

    if Path(model).is_dir() and not (Path(model) / "preprocessor_config.json").is_file():
        return None
    try:
        with quiet():
            return transformers.AutoImageProcessor.from_pretrained(str(model), backend="pil")
    except (OSError, ImportError, *MISSHAPEN) as reason:
        raise DataError(
            f"transformers cannot load what makes the model's pictures: {reason}",
            where=str(model),
            remedy="correct preprocessor_config.json",
        ) from reason


def _opened(path: Path) -> Any:
    """The picture in ``path``, in red, green and blue."""
    try:
        from PIL import Image
    except ImportError as reason:
        raise DataError(
            "image files need Pillow, which is not installed", remedy="pip install 'compress-model[pictures]'"
        ) from reason
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise DataError(
                    f"a picture of {picture.width} x {picture.height} is too large",
                    where=str(path),
                    remedy="make it smaller, or remove it",
                )
            if picture.mode not in MODES:
                cause = f"a picture whose numbers are `{picture.mode}` is not one of eight bits a channel"
                raise DataError(cause, where=str(path), remedy="save it with eight bits a channel")
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as reason:
        raise DataError(f"cannot read the picture: {reason}", where=str(path), remedy="leave it out") from reason


def _made(processor: Any, picture: Any, size: Size) -> Tensor:
    if processor is not None:
        return _processed(processor, picture)
    pixels = torch.from_numpy(np.asarray(_cut(picture, size)).copy()).float() / 255
    centre, spread = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, SPREAD))
    return ((pixels.permute(2, 0, 1) - centre) / spread)[None]


def _processed(processor: Any, picture: Any) -> Tensor:
    remedy = "correct preprocessor_config.json"
    try:
        pixels: Tensor = processor(picture, return_tensors="pt")["pixel_values"]
    except (RuntimeError, *MISSHAPEN) as reason:
        raise DataError(f"the model's preprocessor does not take pictures: {reason}", remedy=remedy) from reason
    if not pixels.isfinite().all():
        raise DataError("the model's preprocessor makes pictures of numbers that are not finite", remedy=remedy)
    return pixels


def _cut(picture: Any, size: Size) -> Any:
    """The middle of the picture, as large as it goes, resized to ``size`` (height, width)."""
    from PIL.Image import Resampling

    height, width = size
    factor = min(picture.width / width, picture.height / height)
    left, upper = (picture.width - factor * width) / 2, (picture.height - factor * height) / 2
    box = (left, upper, left + factor * width, upper + factor * height)
    return picture.resize((width, height), Resampling.BICUBIC, box=box)
