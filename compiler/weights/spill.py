"""Scratch tensors: what is too expensive to compute twice, kept in the work directory until the run ends."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from compiler.errors import CheckpointError
from compiler.ir.types import TensorType
from compiler.weights.tensorfile import header_bytes, read_header, read_rows, read_tensor

_DIGEST = "digest of the bundle"


class SpillSource:
    """A Source of computed tensors, each named by its content. In memory when ``directory`` is None.

    A meta tensor (a planned one) has a name and a type but can never be read.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._types: dict[str, TensorType] = {}
        self._memory: dict[str, Tensor] = {}

    @property
    def types(self) -> Mapping[str, TensorType]:
        return self._types

    def add(self, name: str, tensor: Tensor) -> str:
        """Store ``tensor`` and return its key: ``name`` and a hash of the content."""
        tensor = tensor.detach().contiguous()
        key = f"{name}-{_content_hash(tensor)}"
        if key not in self._types:
            self._types[key] = TensorType(tensor.dtype, tuple(tensor.shape))
            self._store(key, tensor)
        return key

    @contextmanager
    def temporary(self) -> Generator[None]:
        """What is added inside is forgotten at the end, and the space that it takes given back."""
        before = {*self._types}
        try:
            yield
        finally:
            for key in self._types.keys() - before:
                del self._types[key]
                self._memory.pop(key, None)
                if self._directory is not None:
                    (self._directory / f"{key}.safetensors").unlink(missing_ok=True)

    def read(self, key: str) -> Tensor:
        if self._directory is None:
            return self._memory[key].clone()
        path = self._directory / f"{key}.safetensors"
        return read_tensor(path, read_header(path)["tensor"])

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        if self._directory is None:
            return self._memory[key][start:stop].clone()
        path = self._directory / f"{key}.safetensors"
        return read_rows(path, read_header(path)["tensor"], start, stop)

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(sorted(self._types)).encode()).hexdigest()

    def identity(self) -> str:
        return self.fingerprint()

    def _store(self, key: str, tensor: Tensor) -> None:
        if tensor.is_meta:
            return
        if self._directory is None:
            self._memory[key] = tensor.clone()
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        _write(self._directory / f"{key}.safetensors", {"tensor": tensor})


class Progress:
    """Bundles of tensors by name, in files that are complete or not there. Nothing is kept without a ``directory``."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    @property
    def keeps(self) -> bool:
        """Whether what is saved can be loaded again."""
        return self._directory is not None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors``, in place of an earlier bundle called ``name``."""
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            bundle = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            _write(self._path(name), {**bundle, _DIGEST: _digest(bundle)})

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The bundle called ``name``; None when there is none, or it is not what was saved any more."""
        if self._directory is None or not self._path(name).exists():
            return None
        try:
            bundle = {key: read_tensor(self._path(name), where) for key, where in read_header(self._path(name)).items()}
        except CheckpointError:
            return None
        digest = bundle.pop(_DIGEST, None)
        return bundle if digest is not None and torch.equal(digest, _digest(bundle)) else None

    def drop(self, name: str) -> None:
        """Give back the space of the bundle called ``name``, if there is one."""
        if self._directory is not None:
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return Path(self._directory or "", f"{name}.safetensors")


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(header_bytes({key: TensorType(t.dtype, tuple(t.shape)) for key, t in tensors.items()}))
        for tensor in tensors.values():
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
    partial.rename(path)


def _digest(bundle: Mapping[str, Tensor]) -> Tensor:
    """A hash of a bundle, uint8 [32]."""
    lines = sorted(f"{key} {_content_hash(tensor)}" for key, tensor in bundle.items())
    return torch.frombuffer(bytearray(hashlib.sha256("\n".join(lines).encode()).digest()), dtype=torch.uint8)


def _content_hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if not tensor.is_meta:
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
