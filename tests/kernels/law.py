"""The law of all kernels: what a plan's launches write is what the reference says, whatever lay there before."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from backends.kernels.launch import INTERPRETED, Plan

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS = INTERPRETED or DEVICE == "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The interpreter cuts off what does not fit into bfloat16, which is twice the error of rounding.
ULPS = 2 if INTERPRETED else 1


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values [shape] of ``dtype`` on the device of the tests."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def holds(kernel: ModuleType, *inputs: Any, length: int, rounded: bool = False, tile: Any = None) -> None:
    """Asserts that the plan of ``kernel`` for ``inputs`` writes what its reference says.

    ``length`` is how many products a result sums; ``rounded``: operands are rounded to the dtype of the activations on
    the way, as matrix units need them. ``tile``: one that the kernel's table would not choose.
    """
    assert kernel.outside(*inputs) is None
    expected = _several(kernel.reference(*(_wide(value) for value in inputs)))
    plan = kernel.plan(*inputs) if tile is None else kernel.plan(*inputs, tile=tile)
    spoil(plan, inputs)
    before = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    for actual, wide in zip(_several(plan.run()), expected, strict=True):
        assert actual.shape == wide.shape
        coarse = next(value.dtype for value in inputs if isinstance(value, Tensor) and value.is_floating_point())
        _close(actual, wide, length, coarse if rounded else torch.float32)
    for value, old in zip(inputs, before, strict=True):
        assert not isinstance(value, Tensor) or torch.equal(value, old), "an input was written to"


def spoil(plan: Plan, inputs: tuple[Any, ...]) -> None:
    """Fills what the launches may write, results and scratch of floating point, with NaN."""
    kept = {value.untyped_storage().data_ptr() for value in inputs if isinstance(value, Tensor)}
    for launch in plan.launches:
        for value in launch.arguments.values():
            if (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and value.untyped_storage().data_ptr() not in kept
            ):
                value.fill_(torch.nan)


def _close(actual: Tensor, wide: Tensor, length: int, operands: torch.dtype) -> None:
    if not actual.is_floating_point():
        assert torch.equal(actual, wide)
        return
    scale = wide.abs().max().item() if wide.numel() else 0.0
    summed = 4 * torch.finfo(torch.float32).eps * max(length, 1) ** 0.5
    coarse = ULPS * torch.finfo(operands).eps if operands != torch.float32 else 0.0
    relative = ULPS * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), wide.double(), rtol=relative, atol=(summed + coarse) * scale)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _several(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)
