"""How far outputs are from those wanted, with the gradient in closed form, in pieces that need little memory."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 128


def divergence(found: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
    """Mean KL(wanted || found) of logits [.., V] in nats, and its gradient by ``found``.

    The gradient is (p_found - p_wanted) / count, with p the distributions and count the number of them.
    """
    gradient = torch.empty_like(found)
    count = found[..., 0].numel()
    total = 0.0
    flat = (tensor.reshape(-1, tensor.shape[-1]).split(ROWS) for tensor in (found.detach(), wanted, gradient))
    for ours, theirs, into in zip(*flat, strict=True):
        ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
        chances = theirs.exp()
        total += float((chances * (theirs - ours)).sum())
        into.copy_(ours.exp_().sub_(chances).div_(count))
    return total / count, gradient


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean over vectors of |found - wanted|^2 / |wanted|^2, both [.., width].

    Each vector counts the same: the few of huge norm that language models have would hide all others.
    """
    energy = wanted.square().sum(-1)
    return ((found - wanted).square().sum(-1) / energy.clamp_min(torch.finfo(energy.dtype).tiny)).mean()
