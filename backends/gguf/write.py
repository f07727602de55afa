"""Write a GGUF file: header first, then one tensor after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backends.gguf.emission import GgufEmission
from backends.gguf.header import GgufFile, Metadata
from backends.gguf.tokenizer import tokenizer_metadata
from compiler.weights.gguf_header import read_gguf_header
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

    Raises TargetError for a tokenizer that llama.cpp cannot have, and what the writer raises.
    """
    from compiler.weights.writer import write

    metadata = {
        "general.architecture": emission.kind,
        "general.type": "model",
        "general.name": str(emission.config.get("_name_or_path") or emission.architecture),
        "general.quantization_version": QUANTIZATION_VERSION,
        **emission.sizes,
        **_tokenizer(emission, sources.get("model")),
    }
    file = GgufFile(FILE_NAME, emission.tensors, metadata, emission.formats)
    write(emission.tensors, sources, directory, shards=[file], on_progress=on_progress, **options)


def _tokenizer(emission: GgufEmission, model: Source | None) -> Metadata:
    """That of the source: as a GGUF file has it, or made from the files beside a checkpoint."""
    from compiler.weights.checkpoint import Checkpoint, save_tokenizer
    from compiler.weights.tokens import keep_tokens

    if not isinstance(model, Checkpoint):
        return {"tokenizer.ggml.model": "none"}
    (file, *_) = model.files
    if emission.tokens is None and file.suffix == ".gguf":
        found = read_gguf_header(file).metadata
        return {key: value for key, value in found.items() if key.startswith("tokenizer.")}
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(model, Path(folder))
        if emission.tokens is not None:
            keep_tokens(Path(folder), emission.tokens)
        return tokenizer_metadata(Path(folder), int(emission.config["vocab_size"]))
