"""What a block of a GGUF file holds, whatever its format: codes, and what they are multiplied by and lessened by.

A block of ``size`` elements is cut into parts of ``part``. Code q of part p stands for d * s_p * q - e * m_p, with d
and e float16 of the block and s_p, m_p small integers of the part. Formats without such have one part and s = m = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Blocks taken apart, n of them: codes int [n, size], scale and least int [n, parts], d and e float16 [n].

    ``e`` is the factor of ``least``; both are zeros where the format has none.
    """

    codes: Tensor
    scale: Tensor
    least: Tensor
    d: Tensor
    e: Tensor


@dataclass(frozen=True)
class Layout:
    """A block format. ``number`` is what headers call it; a block of ``size`` elements takes ``nbytes`` bytes.

    Codes lie within ``codes``, scales of parts within ``scales`` ((1, 1): there are none), what is subtracted within 0
    and ``most`` (0: nothing is). ``signed`` says that what is subtracted may be negative.
    """

    name: str
    number: int
    size: int
    nbytes: int
    part: int
    codes: tuple[int, int]
    scales: tuple[int, int]
    most: int
    signed: bool
    pack: Callable[[Block], Tensor]
    unpack: Callable[[Tensor], Block]

    @property
    def parts(self) -> int:
        """Parts of a block."""
        return self.size // self.part

    @property
    def bits(self) -> int:
        """Of a code; of three values two."""
        return (self.codes[1] - self.codes[0]).bit_length()


def halves(*floats: Tensor) -> Tensor:
    """float16 [n] each as bytes [n, 2 * count], little-endian."""
    return torch.stack(floats, -1).contiguous().view(torch.uint8)


def floats(data: Tensor) -> Tensor:
    """Bytes [n, 2 * count] as float16 [n, count]."""
    return data.contiguous().view(torch.float16)


def stacked(values: Tensor, bits: int) -> Tensor:
    """Unsigned values [n, lanes, width] as bytes [n, width]: lane i in the bits from i * bits on."""
    lanes = (values[:, lane].int() << (lane * bits) for lane in range(values.shape[1]))
    return sum(lanes, torch.zeros((), dtype=torch.int32)).to(torch.uint8)


def lanes(data: Tensor, bits: int) -> Tensor:
    """The inverse of ``stacked``: int32 [n, lanes, width]."""
    whole = data.int()
    return torch.stack([(whole >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], 1)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Bytes side by side."""
    return torch.cat(list(parts), -1)


def plain(codes: Tensor, d: Tensor, e: Tensor | None = None) -> Block:
    """A block of one part without integer scales."""
    one = torch.ones(len(codes), 1, dtype=torch.int32)
    if e is None:
        return Block(codes, one, 0 * one, d, torch.zeros_like(d))
    return Block(codes, one, one, d, e)
