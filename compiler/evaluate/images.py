"""Labelled pictures in idx files (the format of MNIST), checked, as what a model of pictures takes."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compiler.datafiles import picture_files
from compiler.errors import DataError
from compiler.frontend.sizes import image_shape
from compiler.weights.tensorfile import parse_json, read_document

MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pictures, which most models of pictures are trained with."""
LARGEST = 1 << 31  # a compressed file can claim, and hold, any number of bytes
AGAIN = "fetch the file again"
BYTES = 8  # the code of the type uint8
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Pictures:
    """``pixels`` uint8 [count, height, width], and ``labels`` int64 [count]."""

    pixels: Pixels
    labels: Tensor


def read_pictures(folder: Path, part: str, count: int) -> Pictures:
    """The first ``count`` pictures of a part (``train`` or ``t10k``) of ``folder``, ``.gz`` or not.

    Raises DataError when a file is missing, is no idx file of bytes, or holds fewer.
    """
    images, labels = picture_files(folder, part)
    pixels, named = read_idx(images, 3, count), read_idx(labels, 1, count)
    return Pictures(pixels, torch.from_numpy(named.astype(np.int64)))


def read_idx(path: Path, dimensions: int, count: int) -> Pixels:
    """The first ``count`` entries of an idx file of bytes, [count, ...]; only these are read.

    Raises DataError when it is none of so many ``dimensions``, or has fewer entries.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            magic = file.read(4)
            if magic != bytes([0, 0, BYTES, dimensions]):
                raise DataError(f"is no idx file of bytes with {dimensions} dimensions", where=str(path), remedy=AGAIN)
            sizes = file.read(4 * dimensions)
            if len(sizes) < 4 * dimensions:
                raise DataError("the file ends in its header", where=str(path), remedy=AGAIN)
            shape = np.frombuffer(sizes, ">u4").astype(int).tolist()
            if shape[0] < count:
                raise DataError(
                    f"there are {shape[0]} entries where {count} are asked for",
                    where=str(path),
                    remedy="ask for fewer samples",
                    option="samples",
                )
            size = count * math.prod(shape[1:])
            if size > LARGEST:
                cause = f"{count} entries of {shape[1:]} are more than {LARGEST} bytes"
                raise DataError(cause, where=str(path), remedy="ask for fewer samples, or fetch the file again")
            data = file.read(size)
    except (OSError, EOFError, zlib.error) as reason:
        raise DataError(f"cannot read the pictures: {reason}", where=str(path), remedy=AGAIN) from reason
    if len(data) < size:
        raise DataError(f"the file ends {size - len(data)} bytes early", where=str(path), remedy=AGAIN)
    return np.frombuffer(data, np.uint8).reshape(count, *shape[1:])


def picture_tensors(pixels: Pixels, size: Size, mean: Sequence[float], spread: Sequence[float]) -> Iterator[Tensor]:
    """Grey ``pixels`` [count, height, width] one by one, resized to ``size``, as [1, 3, height, width]."""
    centre, scale = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(spread).view(1, 3, 1, 1)
    for grey in pixels:
        one = torch.from_numpy(grey.astype(np.float32))[None, None] / 255
        large = functional.interpolate(one, size=size, mode="bicubic").expand(-1, 3, -1, -1)
        yield (large - centre) / scale


def model_pictures(path: str | Path, pixels: Pixels, size: Size | None, usual: Size) -> Iterator[Tensor]:
    """``pixels`` as the model in ``path`` takes them: with the mean and spread of its ``preprocessor_config.json``, or
    of ImageNet, and of ``size``; without one, of the size that this file says, or else of the ``usual`` one."""
    found = _preprocessor(Path(path))
    return picture_tensors(pixels, size or _size(found.get("crop_size") or found.get("size")) or usual, *_scale(found))


def square(side: int | None) -> Size | None:
    """The size of pictures that are ``side`` pixels high and wide."""
    return None if side is None else (side, side)


def usual_size(config: Any) -> Size:
    """The size of pictures that a model's config says."""
    _, height, width = image_shape(config)
    return height, width


def _preprocessor(path: Path) -> dict[str, Any]:
    file = path / "preprocessor_config.json"
    return parse_json(read_document(file), file) if file.is_file() else {}


def _scale(preprocessor: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and spread of the three colours. Raises DataError where a preprocessor names other than three numbers."""
    scale = preprocessor.get("image_mean", MEAN), preprocessor.get("image_std", SPREAD)
    for numbers in scale:
        if not isinstance(numbers, list | tuple) or [isinstance(each, int | float) for each in numbers] != [True] * 3:
            cause = f"the preprocessor scales pictures by {numbers}, which are no three numbers"
            raise DataError(cause, remedy="correct preprocessor_config.json")
    return scale


def _size(said: Any) -> Size | None:
    if isinstance(said, dict):
        sides = cast(dict[str, int], said)
        height = sides.get("height") or sides.get("shortest_edge")
        return (height, sides.get("width") or height) if height else None
    return (said, said) if said else None
