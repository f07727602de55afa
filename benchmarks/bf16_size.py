"""What weights take in backends/kernels/bf16_codec.py, beside their entropy and a Huffman code of their exponents.

    python benchmarks/bf16_size.py models/smollm2/*.gguf models/whisper

Prints bytes per weight, over bfloat16's two. Matrices alone are counted, each with a code of its own, and rounded to
bfloat16 where they are stored otherwise; dequantised weights have the exponents of the weights they came from.
"""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backends.kernels.bf16_codec import encode, reference
from compiler.weights.checkpoint import open_checkpoint


def main() -> None:
    table = Table("checkpoint", "weights", "entropy", "Huffman", "stored", "encoded", "decoded")
    for path in sys.argv[1:]:
        table.add_row(path, *_row(path))
    Console(width=120).print(table)


def _row(path: str) -> Iterator[str]:
    bounds, codes, stored, elements, encoding, decoding = 0.0, 0.0, 0, 0, 0.0, 0.0
    for weight in _matrices(path):
        counts = torch.bincount(weight.view(torch.int16).int().flatten() >> 7 & 0xFF, minlength=256)
        start = time.process_time()
        coded = encode(weight)
        encoding -= start - time.process_time()
        start = time.process_time()
        decoded = reference(*coded)
        decoding -= start - time.process_time()
        if not torch.equal(decoded.view(torch.int16), weight.view(torch.int16)):
            raise SystemExit(f"a weight of {path} came back as another")
        elements += weight.numel()
        bounds += weight.numel() + _entropy(counts) / 8
        codes += weight.numel() + _huffman(counts) / 8
        stored += coded.size
    yield f"{elements / 1e6:.1f} M"
    yield from (f"{size / 2 / elements:.4f}" for size in (bounds, codes, stored))
    yield from (f"{2 * elements / 1e6 / seconds:.0f} MB/s" for seconds in (encoding, decoding))


def _matrices(path: str) -> Iterator[Tensor]:
    checkpoint = open_checkpoint(path)
    for name, kind in checkpoint.types.items():
        if len(kind.shape) >= 2 and kind.dtype.is_floating_point:
            yield checkpoint.read(name).to(torch.bfloat16)


def _entropy(counts: Tensor) -> float:
    """Bits of all exponents."""
    found = counts[counts > 0].double()
    return -(found * (found / found.sum()).log2()).sum().item()


def _huffman(counts: Tensor) -> float:
    """Bits of all exponents in their Huffman code: the sum over its inner nodes."""
    order = count()
    heap = [(value, next(order)) for value in counts.tolist() if value]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap)[0] + heapq.heappop(heap)[0]
        total += both
        heapq.heappush(heap, (both, next(order)))
    return total


if __name__ == "__main__":
    main()
