"""Packed linear maps: projections of SmolLM2-135M and of Llama-3-8B, from one token to a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor

from backends.kernels.packed_linear import Tile
from backends.kernels.packed_weight import dense, unpacked
from benchmarks.kernels import Case

# N, K and G of a weight, its bits, whether it has zero points, and numbers of tokens.
CASES = (
    ((1536, 576), 9, 4, False, (1, 16)),
    ((4096, 4096), 32, 4, False, (1, 4, 16, 64, 256, 4096)),
    ((4096, 4096), 32, 4, True, (1, 16)),
    ((14336, 4096), 32, 4, False, (1, 16)),
    ((4096, 14336), 112, 4, False, (1, 16)),
    ((4096, 4096), 32, 2, False, (1, 16)),
    ((4096, 4096), 32, 3, False, (1, 16)),
    ((4096, 4096), 1, 8, False, (1, 16)),
)
SMALL = (
    ((1536, 576), 9, 4, False, (1, 16)),
    ((256, 512), 4, 4, True, (1,)),
    ((256, 512), 4, 3, False, (1,)),
)


def cases(device: torch.device | str) -> Iterator[Case]:
    yield from _made(CASES, device)


def small(device: torch.device | str) -> Iterator[Case]:
    """Sizes for counting."""
    yield from _made(SMALL, device)


def _made(table: tuple[Any, ...], device: torch.device | str) -> Iterator[Case]:
    for (rows, width), groups, bits, asymmetric, several in table:
        words = random_words(rows, width * bits // 32, device)
        scales = (torch.rand(rows, groups, device=device) / width**0.5).to(torch.bfloat16)
        zeros = random_words(rows * bits // 32, groups, device) if asymmetric else None
        for tokens in several:
            x = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)
            name = f"{tokens} x {width} > {rows}, {bits} bits{', zero points' if asymmetric else ''}"
            yield Case(name, (x, words, scales, zeros, bits), 2 * tokens * rows * width, peers)


def random_words(rows: int, width: int, device: torch.device | str) -> Tensor:
    """int32 [rows, width], all bits random."""
    return torch.randint(-(2**31), 2**31, (rows, width), dtype=torch.int64, device=device).to(torch.int32)


def peers(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> dict[str, Callable[[], Any]]:
    """A dense weight, and kernels for four bits that others made, where they are installed."""
    weight = dense(words, scales, zeros, bits, x.shape[-1]).to(x.dtype)
    found: dict[str, Callable[[], Any]] = {"torch, bf16": lambda: x @ weight.mT}
    if bits == 4 and zeros is None and x.shape[-1] % 1024 == 0:
        found["tinygemm"] = tinygemm(x, words, scales)
        if find_spec("gemlite"):
            found["gemlite"] = _gemlite(x, words, scales)
    return found


def tinygemm(x: Tensor, words: Tensor, scales: Tensor) -> Callable[[], Any]:
    """ATen's kernel for CUDA: bytes hold two codes, the first in the upper bits; 8 stands for 0."""
    group = x.shape[-1] // scales.shape[-1]
    codes = unpacked(words, 4, x.shape[-1])
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    table = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, group, table)


def _gemlite(x: Tensor, words: Tensor, scales: Tensor) -> Callable[[], Any]:
    """The public Triton kernels, in float16, which they are tuned for."""
    import gemlite

    rows, width = words.shape[0], x.shape[-1]
    group = width // scales.shape[-1]
    layer = gemlite.GemLiteLinear(
        W_nbits=4,
        group_size=group,
        in_features=width,
        out_features=rows,
        input_dtype=gemlite.DType.FP16,
        output_dtype=gemlite.DType.FP16,
    )
    layer.pack(unpacked(words, 4, width), scales.half(), 8, None, fma_mode=False)
    half = x.half()
    return lambda: layer(half)


def candidates(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> list[Tile]:
    """Each design that suits the number of tokens."""
    tokens = x.numel() // x.shape[-1]
    found = []
    if tokens <= 32:
        shapes = ((32, 2), (64, 4), (128, 4), (128, 8))
        wide = 16 if tokens <= 16 else 32
        found = [
            Tile("matrix", wide, rows, 4, warps, stages, splits)
            for (rows, warps), stages, splits in product(shapes, (3, 4, 6), (1, 2, 4, 8))
        ]
    if 32 < tokens <= 1024:
        shapes = ((64, 64, 2, 4), (64, 64, 4, 4), (64, 128, 2, 4), (64, 128, 2, 8), (128, 64, 2, 4), (128, 128, 2, 8))
        found += [Tile("matrix", *shape, stages) for shape, stages in product(shapes, (2, 3, 4))]
    if tokens > 128:
        found += [Tile("widened", 1, *shape, 4, 1) for shape in ((4, 16), (8, 16), (16, 16), (4, 64), (16, 4))]
    return found
