"""A causal language model that reads through its live cache, in pieces, and may branch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PIECE = 512


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class Reader:
    """A model and a cache that holds the tokens ``seen``, int64 [tokens]."""

    model: Any
    cache: Any = None
    seen: Tensor = field(default_factory=_none)

    @property
    def length(self) -> int:
        """The tokens that the cache holds."""
        return len(self.seen)

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """Take ``ids`` [tokens] into the cache; their logits, float32 [tokens, vocabulary]."""
        result = self.model(input_ids=ids[None], past_key_values=self.cache, use_cache=True)
        self.cache, self.seen = result.past_key_values, torch.cat([self.seen, ids])
        return result.logits[0].float()

    def read_up_to(self, ids: Tensor) -> None:
        """Read what of ``ids`` [tokens] the cache does not hold, in pieces; afresh where it holds something else."""
        if not torch.equal(ids[: self.length], self.seen):
            self.cache, self.seen = None, _none()
        for piece in ids[self.length :].split(PIECE):
            self.read(piece)

    def likelihood(self, ids: Tensor) -> tuple[float, bool]:
        """Log-probability (nats) of the tokens ``ids`` after what was read, and whether greedy decoding gives them.

        The last token read is read with them, so leave it out before: ``ids[0]`` is that token.
        """
        logits, wanted = self.read(ids[:-1]), ids[1:]
        chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
        return chosen.sum().item(), bool((logits.argmax(-1) == wanted).all())

    def branch(self) -> Reader:
        """A reader that goes on from here and leaves this one where it is."""
        return Reader(self.model, copy.deepcopy(self.cache), self.seen)

    def bytes(self) -> int:
        """Memory of the tensors in the cache."""
        return sum(storage_bytes(cached(self.cache)))


def cached(cache: Any) -> list[Tensor]:
    """The tensors of a cache."""
    layers = getattr(cache, "layers", ())
    return [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]


def storage_bytes(tensors: list[Tensor]) -> list[int]:
    """Bytes of the distinct storages, so that a view counts the memory that it keeps alive."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return list(storages.values())
