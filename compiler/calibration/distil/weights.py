"""Weights that are trained: in units of their own size, all of their numbers or an adapter of low rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BETAS = (0.9, 0.98)
EPS = 1e-12
WARM = 0.1  # of all steps, during which the rate rises


@dataclass
class Trained:
    """A weight w + s * change, where s is the root mean square of each row of w, so that changes have no unit.

    Where an element of a sparse weight is gone, s is zero: it stays so. ``factors`` are the change itself, or two
    matrices whose product it is; both start such that it is zero.
    """

    start: Tensor
    rows: Tensor
    factors: tuple[Tensor, ...]

    @staticmethod
    def of(weight: Tensor, rank: int, source: torch.Generator, kept: Tensor | None = None) -> Trained:
        """``weight`` [.., out, in], of which ``kept`` (bool) remains if it is sparse.

        ``rank`` 0, or one that saves nothing, trains all of its numbers.
        """
        start = weight.float()
        *_, rows, columns = start.shape
        size = start.square().mean(-1, keepdim=True).sqrt()
        size = size if kept is None else size * kept
        if not rank or rank * (rows + columns) >= rows * columns:
            return Trained(start, size, (torch.zeros_like(start),))
        down = torch.randn(*start.shape[:-2], rank, columns, generator=source)
        return Trained(start, size * rank**-0.5, (torch.zeros(*start.shape[:-1], rank), down))

    def value(self) -> Tensor:
        """The weight as it now is, of which gradients can be taken."""
        first, *rest = self.factors
        return (self.start + self.rows * (first @ rest[0] if rest else first)).requires_grad_()

    def stored(self, dtype: torch.dtype) -> Tensor:
        """The weight as it now is, in ``dtype``."""
        return self.value().detach().to(dtype)

    def gradients(self, gradient: Tensor) -> list[Tensor]:
        """Of the factors, from that of the weight."""
        scaled = gradient * self.rows
        if len(self.factors) == 1:
            return [scaled]
        up, down = self.factors
        return [scaled @ down.mT, up.mT @ scaled]


class Adam:
    """Adam (arXiv 1412.6980) on the factors of ``weights``, its rate rising over the first steps, then falling to 0."""

    def __init__(self, weights: Sequence[Trained], rate: float, steps: int) -> None:
        self.weights = weights
        self.done = 0
        self._rate = rate
        self._steps = steps
        self._moments = [(torch.zeros_like(f), torch.zeros_like(f)) for weight in weights for f in weight.factors]

    @property
    def finished(self) -> bool:
        return self.done >= self._steps

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move by the gradients of the weights, in order."""
        self.done += 1
        rate = self._rate * self._share()
        first, second = (1 - beta**self.done for beta in BETAS)
        parts = (
            part for weight, whole in zip(self.weights, gradients, strict=True) for part in weight.gradients(whole)
        )
        for factor, (mean, square), gradient in zip(self._factors(), self._moments, parts, strict=True):
            mean.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient.square(), 1 - BETAS[1])
            factor.addcdiv_(mean / first, (square / second).sqrt_().add_(EPS), value=-rate)

    def _share(self) -> float:
        """Of the rate, at this step."""
        warm = max(1, round(WARM * self._steps))
        return min(self.done / warm, (self._steps - self.done + 1) / max(1, self._steps - warm + 1))

    def state(self) -> dict[str, Tensor]:
        """All that changes, to go on from later."""
        return {"done": torch.tensor([self.done]), **dict(self._named())}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` gave."""
        self.done = int(state["done"])
        for name, tensor in self._named():
            tensor.copy_(state[name])

    def _factors(self) -> Iterator[Tensor]:
        return (factor for weight in self.weights for factor in weight.factors)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for index, (factor, (mean, square)) in enumerate(zip(self._factors(), self._moments, strict=True)):
            yield from ((f"factor.{index}", factor), (f"mean.{index}", mean), (f"square.{index}", square))
