"""The data that a recipe names, as calls of the model that it is for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiler.calibration.sweep import token_batches
from compiler.datafiles import CAPTIONED, check_kind, has_labelled, taken
from compiler.errors import DataError
from compiler.evaluate.captions import captioned_calls
from compiler.evaluate.images import Size, model_pictures, read_pictures, square, usual_size
from compiler.evaluate.inputs import Window, is_paired, position_limit, text_windows
from compiler.evaluate.loading import load_extractor, load_tokenizer, quiet
from compiler.evaluate.pairs import written_window
from compiler.evaluate.photographs import photographs
from compiler.evaluate.speech import speech_features
from compiler.evaluate.texts import TextData
from compiler.frontend.sizes import input_names
from compiler.ir.graph import Graph
from compiler.ir.positions import longest

PROBES = (1, 2)
"""Tokens of which one at least is no padding, which some models count no position for."""


def data_windows(
    model: Any,
    path: str | Path,
    data: TextData,
    *,
    tokenizer: Any = None,
    image: int | None = None,
    trust_remote_code: bool = False,
) -> list[Window]:
    """``data`` as calls of ``model``, which is loaded from ``path``. What the decoder of an encoder-decoder is fed, the
    model writes itself. ``tokenizer`` is that of the model, loaded where it is not given; pictures are
    ``image`` pixels high and wide, by default as its preprocessor makes them, or as its config says.

    Raises DataError when the model takes other data, or the data is unfit.
    """
    takes = taken(input_names(model))
    check_kind(takes, data.data, type(model).__name__)
    if takes == "pictures":
        found = pictures(path, data, "t10k", square(image), usual_size(model.config))
        return [Window({"pixel_values": each}) for each in found]
    if is_paired(model):
        with quiet():
            return [written_window(model, each, data.length) for each in _given(model, path, data, trust_remote_code)]
    tokenizer = tokenizer or load_tokenizer(path, trust_remote_code=trust_remote_code)
    if takes == CAPTIONED:
        usual, limit = usual_size(model.config), position_limit(model)
        return [Window(each) for each in captioned_calls(path, data, tokenizer, square(image), usual, limit)]
    return text_windows(model, tokenizer, data)


def graph_calls(
    graph: Graph, path: str | Path, data: TextData, *, trust_remote_code: bool = False
) -> list[dict[str, Tensor]]:
    """``data`` as calls of ``graph``, captured from the model in ``path``, which takes a text, pictures or both.

    Raises DataError when ``graph`` takes anything else, or the data is unfit.
    """
    takes = taken(graph.inputs)
    if takes == "text":
        batches = token_batches(graph, data.windows(load_tokenizer(path, trust_remote_code=trust_remote_code)))
        _check_length(graph, batches[0]["input_ids"])
        return batches
    *_, height, width = graph.inputs["pixel_values"].shape
    size = (int(height), int(width))
    if takes == CAPTIONED:
        probes = (torch.full((1, data.length), token) for token in PROBES)
        limit = min(longest(graph, "input_ids", probe) for probe in probes)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        return captioned_calls(path, data, tokenizer, size, size, limit)
    return [{"pixel_values": each} for each in pictures(path, data, "train", size, size)]


def _check_length(graph: Graph, ids: Tensor) -> None:
    length, limit = ids.shape[1], longest(graph, "input_ids", ids)
    if length > limit:
        cause = f"windows of {length} tokens are longer than the {limit} that the model has positions for"
        raise DataError(cause, remedy=f"`length` can be {limit} at most", option="length")


def pictures(path: str | Path, data: TextData, part: str, size: Size | None, usual: Size) -> Iterable[Tensor]:
    """Pictures for the model in ``path``, each [1, 3, height, width]: of labelled ones the first of ``part``.

    They are of ``size``; without one as the model's preprocessor makes them, or else of the ``usual`` one. Raises
    DataError where there are too few, or they cannot be read or come out of another size than ``size``.
    """
    if has_labelled(data.data):
        return model_pictures(path, read_pictures(data.data, part, data.samples).pixels, size, usual)
    return photographs(path, data.data, data.samples, data.seed, size, usual)


def check_windows(
    model: Any, path: str | Path, data: TextData, *, image: int | None = None, trust_remote_code: bool = False
) -> None:
    """Raises DataError when ``data`` is unfit for ``model``, of which no weight is read."""
    if is_paired(model):
        check_kind(taken(input_names(model)), data.data, type(model).__name__)
        _given(model, path, data, trust_remote_code)
    else:
        data_windows(model, path, data, image=image, trust_remote_code=trust_remote_code)


def _given(model: Any, path: str | Path, data: TextData, trust_remote_code: bool) -> list[Tensor]:
    """What the encoder gets: windows of a text [1, length], or audio features of clips [1, bands, frames]."""
    if model.main_input_name == "input_features":
        return speech_features(load_extractor(path, model.config), data.data, data.samples, data.seed)
    windows = data.windows(load_tokenizer(path, trust_remote_code=trust_remote_code))
    return list(windows.split(1))
