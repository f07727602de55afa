"""Let queries and unrotated keys meet in as few numbers as calibration can tell apart.

A head's unrotated score is q^T P^T B c, with P [n, d] on the query and B [n, r] on the latent. Under the weighted
second moments of q and c its error after dropping all but m singular directions is the sum of their squares; m costs
rows of the query projection, not of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from passes.gqa_to_mla.latent import Analysis, LatentMaps

ALLOWANCE = 0.01  # of the error that the conversion makes anyway
NOTHING = 1e-9  # of the output's energy: an error so small is rounding, and nothing is dropped
MULTIPLE = 8


def common_width(losses: Sequence[Tensor], error: float) -> int:
    """The least multiple of ``MULTIPLE`` at which what is omitted of all ``losses`` is within the allowance.

    ``losses`` are, for every attention, what each singular direction adds to the error, and ``error`` is that of all.
    """
    most = max(len(loss) for loss in losses)
    if error <= NOTHING * len(losses):
        return most
    for width in range(MULTIPLE, most, MULTIPLE):
        if sum(float(loss[width:].sum()) for loss in losses) <= ALLOWANCE * error:
            return width
    return most


class Unrotated:
    """The unrotated part of one attention's ``maps``: its singular directions, head by head.

    ``losses`` is what each direction would add to the error, as a part of the output's energy.
    """

    def __init__(self, analysis: Analysis, maps: LatentMaps) -> None:
        source, moments = analysis.source, analysis.moments
        self.maps = maps
        self.width = maps.query.shape[1] - len(maps.rotary_key)
        rows = maps.up.reshape(source.heads, self.width + source.value_dim, -1)
        self._values = rows[:, self.width :]
        covariance = moments.keys if source.site.softcap else moments.key_covariance
        query_root, query_inverse = _roots(moments.queries)
        latent_root, latent_inverse = _roots(maps.down @ covariance @ maps.down.T)
        product = query_root @ maps.query[:, : self.width].mT @ rows[:, : self.width] @ latent_root
        left, singular, right = torch.linalg.svd(product, full_matrices=False)
        self._query = (query_inverse @ left).mT
        self._key = singular[..., None] * (right @ latent_inverse)
        self.losses = (singular.square().sum(0) * source.site.scale**2 / analysis.energy)[: self.width]

    def cut(self, width: int) -> LatentMaps:
        """The maps with at most ``width`` unrotated numbers a head."""
        if width >= self.width:
            return self.maps
        query, key = _balanced(self._query[:, :width], self._key[:, :width])
        query = torch.cat((query, self.maps.query[:, self.width :]), 1)
        up = torch.cat((key, self._values), 1).flatten(0, 1)
        return replace(self.maps, query=query, up=up, key_error=self.maps.key_error + float(self.losses[width:].sum()))


def _balanced(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [H, m, .] of the same products, those of a query as long as those of its key: no dtype is left by either."""
    sizes = query.norm(dim=-1, keepdim=True), key.norm(dim=-1, keepdim=True)
    share = torch.where(sizes[0] * sizes[1] > 0, sizes[1] / sizes[0], 1.0).sqrt()
    return query * share, key / share


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root [.., n, n] of a second moment and its inverse, zero where the moment is."""
    values, vectors = torch.linalg.eigh(moment)
    floor = values[..., -1:].clamp_min(0) * 1e-12
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(values > floor, 1 / root, torch.zeros_like(root))
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors * inverse[..., None, :]) @ vectors.mT
