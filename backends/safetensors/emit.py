"""Write a checkpoint directory: config.json, tokenizer and generation files, weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backends.safetensors.emission import Emission
from compiler.weights.source import Source

Progress = Callable[[int, int], None]


def emit(
    emission: Emission,
    sources: Mapping[str, Source],
    directory: Path,
    *,
    on_progress: Progress | None = None,
    **options: Any,
) -> None:
    """Write ``emission`` into ``directory``, which exists. ``options`` are those of ``compiler.weights.writer.write``.

    Tokenizer and generation files come along when the model is a checkpoint. Raises what the writer raises.
    """
    from compiler.weights.checkpoint import Checkpoint
    from compiler.weights.tokens import keep_tokens
    from compiler.weights.writer import write

    model = sources.get("model")
    if isinstance(model, Checkpoint):
        model.save_tokenizer(directory)
        if emission.tokens is not None:
            keep_tokens(directory, emission.tokens)
    text = json.dumps(emission.config, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    for name, code in emission.files.items():
        (directory / name).write_text(code, encoding="utf-8")
    write(emission.tensors, sources, directory, on_progress=on_progress, **options)
