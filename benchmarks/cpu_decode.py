"""One token times compressed weights on a CPU, beside the dense weight: medians of interleaved calls.

    OMP_NUM_THREADS=1 python benchmarks/cpu_decode.py

A ratio above 1 means that the compressed weight is faster than ``torch.nn.functional.linear`` of a dense weight of the
same dtype, or of the other dtype where it says so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from backends.kernels.codebook_linear import codebook_linear
from backends.kernels.low_rank_linear import low_rank_linear
from backends.kernels.packed_linear import packed_linear
from backends.kernels.sparse_linear import compressed, sparse_linear

SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096), (14336, 4096))
DTYPES = (torch.bfloat16, torch.float32)


def main() -> None:
    """Prints a table for each shape."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=25)
    arguments.add_argument("--tokens", type=int, default=1)
    arguments.add_argument("--rows", type=int, default=1 << 30, help="the most rows of a weight")
    chosen = arguments.parse_args()
    torch.manual_seed(0)
    for rows, width in [shape for shape in SHAPES if shape[0] <= chosen.rows]:
        times = medians(dict(calls(rows, width, chosen.tokens)), chosen.rounds)
        table = Table("weight", "dtype", "µs", "dense bf16 / it", "dense fp32 / it", title=f"{rows} x {width}")
        for (name, dtype), seconds in times.items():
            ratios = (f"{times['dense', other] / seconds:.2f}" for other in map(_short, DTYPES))
            table.add_row(name, dtype, f"{seconds * 1e6:.0f}", *ratios)
        Console(width=120).print(table)


def calls(rows: int, width: int, tokens: int) -> Iterator[tuple[tuple[str, str], Callable[[], Any]]]:
    """What is timed, by weight and dtype."""
    for dtype in DTYPES:
        x, weight = torch.randn(tokens, width).to(dtype), torch.randn(rows, width).to(dtype)
        yield ("dense", _short(dtype)), _call(torch.nn.functional.linear, x, weight)
        for bits in (2, 3, 4, 8):
            words, scales = packed_weight(rows, width, bits, 64, dtype)
            yield (f"packed, {bits} bits", _short(dtype)), _call(packed_linear, x, words, scales, None, bits)
        yield from of_factors(x, rows, width)
        yield from of_torch(x, rows, width)
        indices = torch.randint(0, 256, (1, rows, width // 8), dtype=torch.uint8)
        codebooks = torch.randn(1, 1, 256, 8).to(dtype)
        yield ("looked up, 256 x 8", _short(dtype)), _call(codebook_linear, x, indices, codebooks, None)
        yield ("2 of 4 kept", _short(dtype)), _call(sparse_linear, x, *compressed(weight, 2, 4), 4)


def of_factors(x: Tensor, rows: int, width: int) -> Iterator[tuple[tuple[str, str], Callable[[], Any]]]:
    """Half the numbers of the weight as two factors, dense and with codes of 4 bits."""
    rank = rows * width // (rows + width) // 2 // 64 * 64
    down, up = torch.randn(rank, width).to(x.dtype), torch.randn(rows, rank).to(x.dtype)
    yield ("factors", _short(x.dtype)), _call(low_rank_linear, x, down, up, None)
    parts = [packed_weight(*shape, 4, 64, x.dtype) for shape in ((rank, width), (rows, rank))]

    def both() -> Tensor:
        hidden = packed_linear(x, *parts[0], None, 4)
        return packed_linear(hidden, *parts[1], None, 4)

    yield ("factors, 4 bits", _short(x.dtype)), both


def of_torch(x: Tensor, rows: int, width: int) -> Iterator[tuple[tuple[str, str], Callable[[], Any]]]:
    """Torch's own products with codes: of 4 bits in groups of 64, and of 8 bits with a scale a row."""
    nibbles = torch.randint(0, 16, (rows, width), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    table = torch.rand(width // 64, rows, 2).to(x.dtype)
    yield ("torch, 4 bits", _short(x.dtype)), _call(torch.ops.aten._weight_int4pack_mm_for_cpu, x, packed, 64, table)
    codes, scales = torch.randint(-128, 128, (rows, width), dtype=torch.int8), torch.rand(rows).to(x.dtype)
    yield ("torch, 8 bits", _short(x.dtype)), _call(torch.ops.aten._weight_int8pack_mm, x, codes, scales)


def packed_weight(rows: int, width: int, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random words and scales."""
    words = torch.randint(-(2**31), 2**31, (rows, width * bits // 32), dtype=torch.int32)
    return words, torch.rand(rows, width // group).to(dtype)


def medians(timed: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Seconds of each call, after one to warm up."""
    found: dict[Any, list[float]] = {name: [] for name in timed}
    for call in timed.values():
        call()
    for _ in range(rounds):
        for name, call in timed.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in found.items()}


def _call(function: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
    return lambda: function(*inputs)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


if __name__ == "__main__":
    main()
