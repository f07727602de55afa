"""Packed codes written out: the up-projection of latent attention with the sizes of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernels import Case
from benchmarks.kernels.packed_linear import random_words


def cases(device: torch.device | str) -> Iterator[Case]:
    yield from _cases(device, ((8192, 1024),))


def small(device: torch.device | str) -> Iterator[Case]:
    yield from _cases(device, ((64, 256),))


def _cases(device: torch.device | str, sizes: tuple[tuple[int, int], ...]) -> Iterator[Case]:
    for rows, width in sizes:
        words = random_words(rows, width // 8, device)
        scales = torch.rand(rows, width // 128, device=device).to(torch.bfloat16)
        yield Case(f"{rows} x {width}, 4 bits", (words, scales, None, 4, width), 0.0)
