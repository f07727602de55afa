"""Which rotary components of the keys stay rotary, and what stands in for the rotation of the others.

Per rotary pair the g key heads give g complex numbers, all turned by the same angle. Any complex combination of them is
turned alike, so a change of basis is exact; the basis here is the one in which the first components carry most of what
rotation is good for. A component that stays takes two cached numbers and keeps its frequency. For one that does not,
the rotation between query and key is replaced by the complex number that best stands for it under the attention, one a
head and pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.gqa_to_mla.moments import Moments
from passes.gqa_to_mla.source import Source, pair_rows

TINY = 1e-6


@dataclass(frozen=True)
class Components:
    """The components of one attention's keys, complex128, per pair from the most to the least important.

    ``key`` [pairs, i, j]: component i is the sum over key heads j of key[i, j] times the head's number.
    ``query`` [pairs, i, j]: a query of key head j meets component i with its number times query[i, j].
    ``phasor`` [H, pairs]: what stands in for the rotation where a component does not rotate.
    ``loss`` [pairs, i], float64: the error of the output, of its energy, when component i stops rotating.
    """

    key: Tensor
    query: Tensor
    phasor: Tensor
    loss: Tensor


def components(source: Source, moments: Moments, energy: float) -> Components:
    """The components of ``source``. ``energy`` is E|output|^2 of the attention."""
    real, imaginary = pair_rows(source)
    keys = _complex_covariance(moments.keys, source, real, imaginary)
    phasor = torch.complex(moments.phasor[..., 0], moments.phasor[..., 1])
    diagonal = moments.queries.diagonal(dim1=1, dim2=2)
    scale = source.site.scale * source.gain
    weight = (diagonal[:, real] + diagonal[:, imaginary]) * moments.frozen * scale**2
    shared = weight.reshape(source.groups, source.heads // source.groups, source.pairs).sum(1).T
    size = shared.mean(1, keepdim=True).clamp_min(torch.finfo(shared.dtype).tiny)
    # of a pair's mean, so that keys and queries keep their scale, whatever dtype holds them
    root = (shared / size).clamp_min(TINY).sqrt().to(keys.dtype)
    values, vectors = torch.linalg.eigh(root[:, :, None] * keys * root[:, None, :])
    vectors, values = vectors.flip(-1), values.flip(-1).clamp_min(0) * size
    dual = vectors.mH
    return Components(dual * root[:, None, :], dual / root[:, None, :], phasor, values / (2 * energy))


def _complex_covariance(moment: Tensor, source: Source, real: Tensor, imaginary: Tensor) -> Tensor:
    """E[k k^H] over the key heads, complex128 [pairs, g, g], from the second moment of all numbers."""
    width = source.groups * source.head_dim
    heads = moment[:width, :width].reshape(source.groups, source.head_dim, source.groups, source.head_dim)

    def block(rows: Tensor, columns: Tensor) -> Tensor:
        return heads[:, rows, :, columns]  # advanced indices move to the front: [pairs, g, g]

    return torch.complex(
        block(real, real) + block(imaginary, imaginary), block(imaginary, real) - block(real, imaginary)
    )


def keep_best(losses: Sequence[Tensor], count: int) -> list[int]:
    """How many components of each pair stay, ``count`` in all, the same for every attention of ``losses``.

    One rotary table serves all layers, so that a place in it goes to the pair where all layers together gain most.
    """
    total = torch.stack(list(losses)).sum(0)
    order = total.flatten().argsort(descending=True, stable=True)[:count]
    return torch.bincount(order // total.shape[1], minlength=total.shape[0]).tolist()
