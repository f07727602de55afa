"""How an encoder of sentences makes one vector of a text, as sentence-transformers keeps it beside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from backends.gguf.header import Metadata
from compiler.errors import CheckpointError, first_line
from compiler.weights.source import Source

FILE = ("1_Pooling", "config.json")
PREFIX = "pooling_mode_"
KINDS = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2}  # llama.cpp's numbers
POOLED = ("bert",)
REMEDY = "fetch it again, or delete it and tell llama.cpp how texts are pooled"


def pooling(architecture: str, model: Source | None) -> tuple[Metadata, tuple[str, ...]]:
    """The entry of the header that says so, and what the user should know; neither where the checkpoint does not say.

    Raises CheckpointError when its file is no JSON of settings.
    """
    from compiler.weights.checkpoint import Checkpoint

    if architecture not in POOLED or not isinstance(model, Checkpoint):
        return {}, ()
    path = model.files[0].parent.joinpath(*FILE)
    if not path.exists():
        return {}, ()
    modes = [name for name, value in _said(path).items() if name.startswith(PREFIX) and value is True]
    if len(modes) == 1 and modes[0] in KINDS:
        return {f"{architecture}.pooling_type": KINDS[modes[0]]}, ()
    named = " and ".join(name.removeprefix(PREFIX) for name in modes) or "nothing"
    return {}, (
        f"the file does not say how a text becomes one vector: {named} of {'/'.join(FILE)} has no number in it",
    )


def _said(path: Path) -> dict[str, object]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as reason:
        raise CheckpointError(f"this is no JSON: {first_line(reason)}", where=str(path), remedy=REMEDY) from reason
    if not isinstance(said, dict):
        raise CheckpointError("this is no mapping of settings", where=str(path), remedy=REMEDY)
    return cast("dict[str, object]", said)
