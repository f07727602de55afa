"""How an encoder of sentences makes one vector of a text, as sentence-transformers keeps it beside a checkpoint."""

from __future__ import annotations

from backends.gguf.header import Metadata
from compiler.errors import CheckpointError
from compiler.weights.source import Source
from compiler.weights.tensorfile import parse_json, read_document

FILE = "1_Pooling/config.json"
PREFIX = "pooling_mode_"
KINDS = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2}  # llama.cpp's numbers
POOLED = ("bert",)


def pooling(architecture: str, model: Source | None) -> tuple[Metadata, tuple[str, ...]]:
    """The entry of the header that says so, and what the user should know; neither where the checkpoint does not say.

    Raises CheckpointError when its file cannot be read or is no JSON of settings.
    """
    from compiler.weights.checkpoint import Checkpoint

    if architecture not in POOLED or not isinstance(model, Checkpoint):
        return {}, ()
    path = model.files[0].parent / FILE
    try:
        said = parse_json(read_document(path), path)
    except (FileNotFoundError, NotADirectoryError):
        return {}, ()
    except OSError as reason:
        remedy = "check that it may be read, or delete it and tell llama.cpp how texts are pooled"
        raise CheckpointError(f"it cannot be read: {reason.strerror}", where=str(path), remedy=remedy) from reason
    modes = [name for name, value in said.items() if name.startswith(PREFIX) and value is True]
    if len(modes) == 1 and modes[0] in KINDS:
        return {f"{architecture}.pooling_type": KINDS[modes[0]]}, ()
    named = " and ".join(name.removeprefix(PREFIX) for name in modes)
    reason = f"{named} of {FILE} has no number in it" if modes else f"no `{PREFIX}` of {FILE} is true"
    return {}, (f"the file does not say how a text becomes one vector: {reason}",)
