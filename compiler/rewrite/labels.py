"""Labels: which of a set of numbers every element of a tensor is multiplied by.

A tensor of labels has the rank of the tensor that it describes. An axis along which the labels do not differ has size
1, as symbolic axes always have. ``FREE`` marks elements that nothing is asked of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FREE = -1


class Labels:
    """Labels 0 to ``count`` - 1, some of which were found to be the same."""

    def __init__(self, count: int, first: Tensor | None = None) -> None:
        self._first = torch.arange(count) if first is None else first

    def copy(self) -> Labels:
        return Labels(len(self._first), self._first)

    @property
    def distinct(self) -> Tensor:
        """One label of each set of equal ones, in order."""
        return self._first.unique()

    def resolved(self, labels: Tensor) -> Tensor:
        """``labels`` with one name for those that are the same."""
        return torch.where(labels == FREE, labels, self._first[labels.clamp_min(0)])

    def merge(self, left: Tensor, right: Tensor) -> None:
        """Let labels at equal places of two tensors be the same, where neither is free."""
        both = (left != FREE) & (right != FREE) & (left != right)
        a, b = left[both], right[both]
        while bool((self._first[a] != self._first[b]).any()):
            least = torch.minimum(self._first[a], self._first[b])
            joined = self._first.clone()
            for side in (self._first[a], self._first[b]):
                joined.scatter_reduce_(0, side, least, "amin")
            self._first = joined[joined[self._first]]

    def joined(self, left: Tensor, right: Tensor) -> Tensor:
        """What two tensors of labels ask of the same elements."""
        left, right = torch.broadcast_tensors(left, right)
        self.merge(left, right)
        return self.resolved(torch.where(left == FREE, right, left))

    def alike(self, labels: Tensor, axes: Sequence[int]) -> Tensor:
        """``labels`` with elements along ``axes`` made the same, free ones too, each of which then has size 1."""
        for axis in axes:
            if labels.shape[axis] > 1:
                top = labels.amax(axis, keepdim=True)
                self.merge(labels, top.expand_as(labels))
                labels = self.resolved(top)
        return labels

    def shrunk(self, labels: Tensor) -> Tensor:
        """``labels`` without the axes along which they do not differ."""
        labels = self.resolved(labels)
        for axis, size in enumerate(labels.shape):
            top = labels.amax(axis, keepdim=True)
            if size > 1 and bool((labels == top).all()):
                labels = top
        return labels

    def fitted(self, labels: Tensor, sizes: Sequence[int]) -> Tensor:
        """``labels`` of a result for an operand of ``sizes`` that was broadcast to it."""
        labels = self.alike(labels, range(labels.ndim - len(sizes))).reshape(labels.shape[labels.ndim - len(sizes) :])
        return self.alike(labels, [axis for axis, size in enumerate(sizes) if size == 1])
