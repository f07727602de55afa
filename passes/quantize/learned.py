"""What is learned of integer codes: by how much each is rounded up or down, or by what weights are divided before.

A weight w [..., out, in] with codes q, scales s and zero points z starts at x = w / s + z, moved into the interval that
is rounded to q. Its value is (round(x + change) - z) s (1 + stretch), through which gradients pass as if nothing was
rounded. `rounding` learns a change of at most a half for each weight by the signs of gradients (AutoRound, arXiv
2309.05516); of `scaling` it is what dividing w by exp(L U + r + c) does, L U of low rank, r and c one number a row and
column (LRQ, arXiv 2407.11534), by Adam. The stretch is at most a half as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compiler.weights.ops.quant import code_range

HALF = 0.499  # how far from a code x may start
LARGEST = 0.5
RANK = 16
RATE = 2e-3  # of Adam, at first
BETAS = (0.9, 0.98)
EPS = 1e-12

Change = Callable[[Sequence[Tensor], Tensor], Tensor]
"""From leaves and w / s [..., out, groups, n] to what is added to x."""


class Learned:
    """One weight. The first of ``leaves`` is the stretch, the others make the change."""

    def __init__(
        self, weight: Tensor, parts: tuple[Tensor, Tensor, Tensor | None], bits: int, change: Change, signs: bool
    ) -> None:
        codes, self._scale, zero = parts
        self._range = code_range(bits)
        self._zero = 0.0 if zero is None else zero.float().unsqueeze(-1)
        groups = self._scale.shape[-1]
        codes = codes.float().unflatten(-1, (groups, -1))
        self._relative = weight.float().unflatten(-1, (groups, -1)) / self._scale.float().unsqueeze(-1)
        self._start = (self._relative + self._zero).clamp(codes - HALF, codes + HALF)
        self._change, self._signs = change, signs
        self.leaves = [torch.zeros(self._scale.shape, requires_grad=True)]
        self._moments: list[tuple[Tensor, Tensor]] = []

    def value(self) -> Tensor:
        """The weight as it now is, float32."""
        codes, scale = self._now()
        return ((codes - self._zero) * scale.unsqueeze(-1)).flatten(-2)

    def _now(self) -> tuple[Tensor, Tensor]:
        x = (self._start + self._change(self.leaves[1:], self._relative)).clamp(*self._range)
        scale = self._scale.float() * (1 + self.leaves[0])
        return x + (x.round() - x).detach(), scale + (scale.to(self._scale.dtype) - scale).detach()

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], done: float, steps: int) -> None:
        """Move against ``gradients`` of the leaves, ``done`` of all ``steps`` being behind."""
        if self._signs:
            for leaf, gradient in zip(self.leaves, gradients, strict=True):
                leaf.sub_(gradient.sign(), alpha=(1 - done) / steps).clamp_(-LARGEST, LARGEST)
            return
        self._moments = self._moments or [(torch.zeros_like(leaf), torch.zeros_like(leaf)) for leaf in self.leaves]
        count = round(done * steps) + 1
        first, second = (1 - beta**count for beta in BETAS)
        for leaf, gradient, (mean, square) in zip(self.leaves, gradients, self._moments, strict=True):
            mean.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient.square(), 1 - BETAS[1])
            leaf.addcdiv_(mean / first, (square / second).sqrt_().add_(EPS), value=-RATE * (1 - done))
        self.leaves[0].clamp_(-LARGEST, LARGEST)

    @torch.no_grad()
    def settled(self) -> tuple[Tensor, Tensor]:
        """Codes int8 and scales as they are stored."""
        codes, scale = self._now()
        return codes.to(torch.int8).flatten(-2), scale.to(self._scale.dtype)


def rounding(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Learned:
    """A change for each weight."""
    made = Learned(weight, (codes, scale, zero), bits, lambda leaves, _: leaves[0], True)
    made.leaves.append(torch.zeros(*scale.shape, weight.shape[-1] // scale.shape[-1], requires_grad=True))
    return made


def scaling(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Learned:
    """Divisors of low rank."""
    *lead, rows, columns = weight.shape
    source = torch.Generator().manual_seed(0)
    shapes = ((*lead, rows, RANK), (*lead, rows, 1), (*lead, 1, columns))
    made = Learned(weight, (codes, scale, zero), bits, _divided, False)
    made.leaves += [torch.zeros(shape, requires_grad=True) for shape in shapes]
    right = torch.randn(*lead, RANK, columns, generator=source) * RANK**-0.5
    made.leaves.append(right.requires_grad_())
    return made


def _divided(leaves: Sequence[Tensor], relative: Tensor) -> Tensor:
    left, rows, columns, right = leaves
    exponent = (left @ right + rows + columns).unflatten(-1, relative.shape[-2:])
    return relative * ((-exponent).exp() - 1)
