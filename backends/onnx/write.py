"""Write an ONNX directory: models, and their tensors in safetensors files that they point into."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from backends.onnx import check
from backends.onnx.emission import OnnxEmission
from backends.onnx.genai import save_genai_config
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
    from compiler.weights.checkpoint import Checkpoint
    from compiler.weights.tokens import keep_tokens

    model = sources.get("model")
    if isinstance(model, Checkpoint):
        model.save_tokenizer(directory)
        if emission.graph.tokens is not None:
            keep_tokens(directory, emission.graph.tokens)
    (directory / "check.py").write_text(Path(check.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    config = json.dumps(dict(emission.config), indent=2, default=str) + "\n"
    (directory / "config.json").write_text(config, encoding="utf-8")
    if emission.runtime.genai:
        save_genai_config(emission, directory)
    save_models(emission, directory, shard_bytes)
    write(emission.tensors, sources, directory, shard_bytes=shard_bytes, on_progress=on_progress, **options)


def save_models(emission: OnnxEmission, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the models without their tensors."""
    save_twin(emission, emission, directory, shard_bytes)


def save_twin(
    emission: OnnxEmission,
    written: OnnxEmission,
    directory: Path,
    shard_bytes: int,
    names: Mapping[str, str] | None = None,
) -> None:
    """Write the models of ``emission``, under other ``names`` if given, over the tensors of what was ``written``."""
    places = _places(written, shard_bytes)
    for name, model in emission.models.items():
        _point(model, places)
        ir.save(model.model(emission.metadata(model)), directory / (names or {}).get(name, name))


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
