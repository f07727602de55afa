"""Where bytes come from: anything that knows its tensors' types up front and reads one on request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from compiler.ir.types import TensorType


class Source(Protocol):
    """A checkpoint (or memory) that ``load`` expressions read from."""

    @property
    def types(self) -> Mapping[str, TensorType]:
        """The dtype and shape of every tensor, known without reading one."""
        ...

    def read(self, key: str) -> Tensor:
        """The tensor called ``key``, in its stored dtype, in fresh memory."""
        ...

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """The rows [start, stop) of the tensor called ``key``, in fresh memory, without reading the others."""
        ...

    def fingerprint(self) -> str:
        """A hash of the content, equal for equal copies; of large files it may leave the inside out."""
        ...

    def identity(self) -> str:
        """A text that changes whenever the content may have changed: work of an earlier run is reused by it."""
        ...


class MemorySource:
    """Tensors that are already in memory, such as a live module's."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    @property
    def types(self) -> Mapping[str, TensorType]:
        return {name: TensorType(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        return self._tensors[key].detach().clone()

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self._tensors[key][start:stop].detach().clone()

    def fingerprint(self) -> str:
        import hashlib

        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def identity(self) -> str:
        return self.fingerprint()
