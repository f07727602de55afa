"""How an encoder of sentences makes one vector of a text, as sentence-transformers keeps it beside a checkpoint."""

from __future__ import annotations

import json

from backends.gguf.header import Metadata
from compiler.weights.source import Source

FILE = ("1_Pooling", "config.json")
KINDS = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2}  # llama.cpp's numbers
POOLED = ("bert",)


def pooling(architecture: str, model: Source | None) -> Metadata:
    """The entry of the header that says so; none where the checkpoint does not, and the user tells llama.cpp."""
    from compiler.weights.checkpoint import Checkpoint

    if architecture not in POOLED or not isinstance(model, Checkpoint):
        return {}
    path = model.files[0].parent.joinpath(*FILE)
    if not path.exists():
        return {}
    said = json.loads(path.read_text(encoding="utf-8"))
    kinds = [number for name, number in KINDS.items() if said.get(name)]
    return {f"{architecture}.pooling_type": kinds[0]} if len(kinds) == 1 else {}
