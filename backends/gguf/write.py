"""Write a GGUF file: header first, then one tensor after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backends.gguf.emission import GgufEmission
from backends.gguf.header import GgufFile, Metadata
from backends.gguf.tokenizer import tokenizer_of
from compiler.weights.source import Source

FILE_NAME = "model.gguf"
QUANTIZATION_VERSION = 2

Progress = Callable[[int, int], None]


def emit(
    emission: GgufEmission,
    sources: Mapping[str, Source],
    directory: Path,
    *,
    on_progress: Progress | None = None,
    **options: Any,
) -> None:
    """Write ``emission`` into ``directory``, which exists. ``options`` are those of ``compiler.weights.writer.write``.

    Raises what the writer raises, and TargetError when llama.cpp cannot have the tokenizer of the tokens that remain.
    """
    from compiler.weights.writer import write

    metadata = {
        "general.architecture": emission.kind,
        "general.type": "model",
        "general.name": str(emission.config.get("_name_or_path") or emission.architecture),
        "general.quantization_version": QUANTIZATION_VERSION,
        **emission.sizes,
        **_tokenizer(emission, sources),
    }
    file = GgufFile(FILE_NAME, emission.tensors, metadata, emission.formats)
    write(emission.tensors, sources, directory, shards=[file], on_progress=on_progress, **options)


def _tokenizer(emission: GgufEmission, sources: Mapping[str, Source]) -> Metadata:
    if emission.tokens is None:
        return emission.tokenizer.metadata
    return tokenizer_of(sources.get("model"), int(emission.config["vocab_size"]), emission.tokens).metadata
