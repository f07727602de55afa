"""Write an ONNX directory: models, and their tensors in safetensors files that they point into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from backends.onnx.emission import OnnxEmission
from backends.onnx.lower import Lowered
from compiler.weights.layout import SHARD_BYTES, layout
from compiler.weights.source import Source
from compiler.weights.writer import write

Progress = Callable[[int, int], None]


def emit(
    emission: OnnxEmission,
    sources: Mapping[str, Source],
    directory: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress | None = None,
    **options: Any,
) -> None:
    """Write ``emission`` into ``directory``, which exists. ``options`` are those of ``compiler.weights.writer.write``.

    Tensors are written one by one into ``model.safetensors``, or shards of it, and models refer to their places: no
    more is in memory than the writer's budget. Raises what the writer raises.
    """
    places = _places(emission, shard_bytes)
    for name, model in emission.models.items():
        _point(model, places)
        ir.save(model.model(emission.metadata(model)), directory / name)
    write(emission.tensors, sources, directory, shard_bytes=shard_bytes, on_progress=on_progress, **options)


def _places(emission: OnnxEmission, shard_bytes: int) -> dict[str, tuple[str, int]]:
    """The file and the first byte of every tensor."""
    shards = layout(emission.tensors, shard_bytes)
    return {name: (shard.name, shard.offsets[name]) for shard in shards for name in shard.tensors}


def _point(model: Lowered, places: Mapping[str, tuple[str, int]]) -> None:
    for name, stored in model.stored.items():
        file, offset = places[name]
        stored.value.const_value = ir.ExternalTensor(
            file, offset, stored.expr.type.nbytes, stored.dtype, shape=ir.Shape(stored.shape), name=name
        )
