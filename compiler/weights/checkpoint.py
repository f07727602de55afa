"""Checkpoints on disk: what they hold, checked before a byte of a weight is read.

``open_checkpoint`` accepts a Hugging Face directory of safetensors files, a hub id of one, or a ``.gguf`` file.
``bind`` and ``unbind`` translate between the tensors of a checkpoint and the parameters of a model class.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from compiler.errors import CheckpointError
from compiler.executor.pool import threads
from compiler.ir.types import TensorType
from compiler.weights.checkpoint_binding import bind, unbind
from compiler.weights.tensorfile import (
    Stored,
    parse_json,
    read_bytes,
    read_document,
    read_header,
    read_rows,
    read_tensor,
)

__all__ = ["Checkpoint", "DirectoryCheckpoint", "bind", "open_checkpoint", "unbind"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SAMPLE = 4096
_AGAIN = "fetch the index and its shards again"
_MODEL_FILES = ("config.json", _INDEX)
_COPIED = re.compile(
    r"(tokenizer.*|special_tokens_map|added_tokens|vocab|generation_config|preprocessor_config|processor_config"
    r"|image_processor.*|video_preprocessor_config|chat_template.*|merges|spiece|sentencepiece.*|.*tokenizer"
    r"|modules|sentence_bert_config|config_sentence_transformers|normalizer|spm|source|target|target_vocab|bpe|dict"
    r"|vocab-src|vocab-tgt)"
    r"\.(json|txt|model|jinja|bpe|tiktoken|spm|codes)"
)
_POOLING = "[0-9]_*/*.json"  # the folder of a module that sentence-transformers puts behind the model
_TEMPLATES = "additional_chat_templates/*.jinja"


class Checkpoint(ABC):
    """A source of weights with a config. ``files`` are the files that hold the weights."""

    path: Path
    config: dict[str, Any]
    files: tuple[Path, ...]

    @property
    def architecture(self) -> str | None:
        """The transformers class that the config names, if it names one."""
        names = self.config.get("architectures") or [None]
        if not isinstance(names, list) or not isinstance(names[0], str | None):
            raise CheckpointError(
                f"`architectures` in config.json is {names!r}",
                where=str(self.path),
                remedy="it must be a list of names of model classes",
            )
        return names[0]

    @property
    @abstractmethod
    def types(self) -> Mapping[str, TensorType]:
        """The dtype and shape of every tensor."""

    @abstractmethod
    def read(self, key: str) -> Tensor:
        """One tensor, in its stored dtype, in fresh memory."""

    @abstractmethod
    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """The rows [start, stop) of one tensor, in fresh memory."""

    def is_filler(self, key: str) -> bool:
        """Whether a tensor that no model has a place for says nothing, so that it may be passed over."""
        return False

    def is_linear(self, key: str) -> bool:
        """Whether a weight is [out, in], as linear maps have it, whichever way its module does."""
        return False

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what the checkpoint holds, equal for equal copies of it."""

    def identity(self) -> str:
        """The fingerprint with the size, time and inode of every weight file: a copy, or an edit of bytes that the
        fingerprint does not cover, has another. Raises CheckpointError when a file is gone.
        """
        return f"{self.fingerprint()}:{_state(self.files)}"

    @abstractmethod
    def save_tokenizer(self, directory: Path) -> list[Path]:
        """Write the tokenizer, the generation config and the like into ``directory``; returns the files."""

    def digests(self) -> dict[str, str]:
        """The sha256 of every weight file, by file name. Reads all of them."""
        with threads(max(1, min(os.cpu_count() or 1, len(self.files)))) as pool:
            return dict(zip((file.name for file in self.files), pool.map(_sha256, self.files), strict=True))


class DirectoryCheckpoint(Checkpoint):
    """A Hugging Face directory: config.json beside one safetensors file, or an index and its shards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_config(path)
        self._tensors = _read_tensors(path)
        self._types = {name: stored.type for name, (_, stored) in self._tensors.items()}
        self.files = tuple(dict.fromkeys(file for file, _ in self._tensors.values()))

    @property
    def types(self) -> Mapping[str, TensorType]:
        return self._types

    def read(self, key: str) -> Tensor:
        return read_tensor(*self._tensors[key])

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return read_rows(*self._tensors[key], start, stop)

    def fingerprint(self) -> str:
        """Covers the config, every header and file size, the first and last bytes of every tensor, and all that goes
        beside the weights.
        """
        digest = hashlib.sha256(repr(sorted(self.config.items())).encode())
        for name, (file, stored) in self._tensors.items():
            digest.update(f"{file.name}|{name}|{stored}".encode())
            edge = min(_SAMPLE, stored.stop - stored.start)
            digest.update(read_bytes(file, stored.start, stored.start + edge).numpy().data)
            digest.update(read_bytes(file, stored.stop - edge, stored.stop).numpy().data)
        for file in self._beside():
            digest.update(f"{file.relative_to(self.path)}|{_sha256(file)}".encode())
        return digest.hexdigest()

    def save_tokenizer(self, directory: Path) -> list[Path]:
        written: list[Path] = []
        for file in self._beside():
            target = directory / file.relative_to(self.path)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(read_document(file))
            written.append(target)
        return written

    def _beside(self) -> list[Path]:
        """The files that belong beside the weights."""
        named = [p for p in self.path.iterdir() if _COPIED.fullmatch(p.name) and p.name not in _MODEL_FILES]
        found = [*named, *self.path.glob(_POOLING), *self.path.glob(_TEMPLATES)]
        for file in found:
            self._check_inside(file)
        return sorted(file for file in found if file.is_file())

    def _check_inside(self, file: Path) -> None:
        """A link may lead anywhere: only the directory itself, or its blobs in a cache of the hub, is copied from."""
        root = self.path.resolve()
        try:
            target = file.resolve(strict=file.is_symlink())
        except (OSError, RuntimeError) as reason:  # before Python 3.13 a link to itself is a RuntimeError
            raise CheckpointError(
                f"{file.name} is a link that leads nowhere",
                where=str(self.path),
                remedy="replace the link with the file itself, or remove it",
            ) from reason
        blobs = [root.parent.parent / "blobs"] if root.parent.name == "snapshots" else []
        if not any(target.is_relative_to(allowed) for allowed in [root, *blobs]):
            raise CheckpointError(
                f"{file.name} is a link to {target}, outside the checkpoint",
                where=str(self.path),
                remedy="replace the link with the file itself",
            )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: a directory, a ``.gguf`` file, or a hub id when no such path exists.

    Raises CheckpointError when it is missing, damaged, pickled, or quantised otherwise than by GPTQ or AutoAWQ.
    """
    local = Path(path).expanduser()
    try:
        if not local.exists() and is_hub_id(str(path)):
            local = _download(str(path))
        return _open_local(local)
    except OSError as reason:
        cause = f"cannot read the checkpoint: {reason.strerror}"
        raise CheckpointError(cause, where=str(local), remedy="check that it is there and may be read") from reason


def check_location(path: str | Path) -> None:
    """Raises CheckpointError for a path at which nothing lies that transformers can load; a hub id is none."""
    local = Path(path)
    if local.is_dir():
        _read_config(local)
    elif local.exists() or not is_hub_id(str(path)):
        _check_gguf(local)


def is_hub_id(text: str) -> bool:
    """Whether ``text`` looks like ``owner/name``, and neither like a path nor like a file."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith(".gguf")


def _open_local(local: Path) -> Checkpoint:
    if local.is_dir():
        return _open_directory(local)
    _check_gguf(local)
    from compiler.weights.gguf import GgufCheckpoint

    return GgufCheckpoint(local)


def _check_gguf(local: Path) -> None:
    if not local.exists():
        raise CheckpointError(f"there is no checkpoint at {local}", remedy="give a directory, a .gguf file or a hub id")
    if local.suffix in _PICKLES:
        raise _pickled(local)
    if local.suffix != ".gguf":
        raise CheckpointError(
            f"{local.name} is not a checkpoint",
            where=str(local),
            remedy="give the directory that holds config.json and the safetensors files",
        )


def _open_directory(local: Path) -> Checkpoint:
    stored = DirectoryCheckpoint(local)
    if not stored.config.get("quantization_config"):
        return stored
    from compiler.weights.packed import PackedCheckpoint

    return PackedCheckpoint(stored)


def _state(files: Iterable[Path]) -> str:
    try:
        found = [
            (file.name, status.st_size, status.st_mtime_ns, status.st_ino) for file in files for status in [file.stat()]
        ]
    except OSError as reason:
        cause = f"cannot read the checkpoint: {reason.strerror}"
        raise CheckpointError(cause, where=str(reason.filename), remedy="fetch the missing file") from reason
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.bpe", "*.tiktoken", "*.spm", "*.codes"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as reason:  # the hub client raises a dozen unrelated kinds
        first = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
        raise CheckpointError(
            f"{hub_id} is neither a path nor a model that could be fetched: {first}",
            remedy="give the path of a local directory",
        ) from reason


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = parse_json(read_document(file), file)
    except OSError as reason:
        raise CheckpointError(
            f"cannot read config.json: {reason.strerror}",
            where=str(path),
            remedy=_likely_meant(path),
        ) from reason
    return config


def _likely_meant(path: Path) -> str:
    gguf = next((file for pattern in ("*.gguf", "gguf/*.gguf") for file in path.glob(pattern)), None)
    if gguf is None and (path / "onnx" / "model.onnx").is_file():
        return "it holds an ONNX model alone, for ONNX Runtime; add `safetensors` to `emit` for a checkpoint"
    return f"give the file itself: {gguf}" if gguf else "give the directory that transformers' save_pretrained wrote"


def _read_tensors(path: Path) -> dict[str, tuple[Path, Stored]]:
    if (path / _SINGLE).is_file():
        return {name: (path / _SINGLE, stored) for name, stored in read_header(path / _SINGLE).items()}
    if (path / _INDEX).is_file():
        return _read_shards(path)
    pickles = sorted(p for p in path.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise _pickled(pickles[0])
    raise CheckpointError(
        f"the directory holds neither {_SINGLE} nor {_INDEX}",
        where=str(path),
        remedy="give the directory that transformers' save_pretrained wrote",
    )


def _read_shards(path: Path) -> dict[str, tuple[Path, Stored]]:
    index = path / _INDEX
    weight_map = parse_json(read_document(index), index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        cause = f"{_INDEX} has no weight_map that names a file for every tensor"
        raise CheckpointError(cause, where=str(index), remedy=_AGAIN)
    tensors: dict[str, tuple[Path, Stored]] = {}
    for file_name in sorted(set(weight_map.values())):
        for name, stored in read_header(_shard(path, file_name)).items():
            if name in tensors:
                cause = f"tensor {name} lies in two shards, {tensors[name][0].name} and {file_name}"
                raise CheckpointError(cause, where=str(path), remedy=_AGAIN)
            tensors[name] = (path / file_name, stored)
    _check_index(weight_map, tensors, index)
    return tensors


def _shard(path: Path, name: str) -> Path:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        cause = f"{_INDEX} names {name!r}, outside the directory"
        raise CheckpointError(cause, where=str(path), remedy="an index names files that lie beside it")
    if not os.path.lexists(path / name):
        raise CheckpointError(
            f"{_INDEX} names {name}, which does not exist", where=str(path), remedy="fetch the missing file"
        )
    return path / name


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, tuple[Path, Stored]], index: Path) -> None:
    for name, file_name in weight_map.items():
        if name not in tensors:
            cause = f"tensor {name} is missing: {_INDEX} places it in {file_name}"
            raise CheckpointError(cause, where=str(index), remedy=_AGAIN)
        if tensors[name][0].name != PurePosixPath(file_name).name:
            cause = f"{_INDEX} places tensor {name} in {file_name}, it lies in {tensors[name][0].name}"
            raise CheckpointError(cause, where=str(index), remedy=_AGAIN)


def _pickled(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file.name} is a pickle: loading it can run any code, so it is refused",
        where=str(file),
        remedy="convert it once in a place you trust: AutoModel.from_pretrained(...).save_pretrained(directory)",
    )
