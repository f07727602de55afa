"""What calibration says about one attention: how much an error in its keys and values would change its output.

To first order, an error e[s, t] in the score of query s and key t moves the output of a head by the sum over t of
a[s, t] e[s, t] (v[t] - o[s]), a being the attention weights and o the head's output. Behind the output projection W its
square is about w[s, t] e[s, t]^2 with w = a^2 |W (v - o)|^2, which are the weights that everything about keys has here.
An error d[t] in the values moves the output by W times the sum of a[s, t] d[t].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.calibration.sweep import Stage, quick_products
from compiler.ir.ops.attention import attention_mask
from passes.gqa_to_mla.source import Source
from passes.gqa_to_mla.turns import Turns

TINY = torch.finfo(torch.float64).tiny


@dataclass
class Moments:
    """Means over calibration tokens, float64. A token has Y = g (d + v) numbers: keys before rotation, then values.

    ``phasor`` [H, pairs, 2]: the complex number that best stands for the rotation of a pair under the weights w[s, t],
    and ``frozen`` [H, pairs] the part of the rotated scores' energy that it misses.
    ``queries`` [H, d, d]: E[w[s] q[s] q[s]^T] with w[s] the sum over t of w[s, t].
    ``keys`` [Y, Y]: the second moment of a token's numbers under the weight that its key has; ``key_mean`` [Y].
    ``values`` [Y, Y]: E[m m^T] of the heads' means m[s] = sum over t of a[s, t] y[t], heads weighted by |W|^2.
    ``outputs`` [H, v, v]: W^T W of the output projection's columns of each head.
    ``collision`` [H]: E[sum over t of a[s, t]^2], one over the number of keys that a query really mixes.
    """

    phasor: Tensor
    frozen: Tensor
    queries: Tensor
    keys: Tensor
    key_mean: Tensor
    values: Tensor
    outputs: Tensor
    collision: Tensor

    @property
    def key_covariance(self) -> Tensor:
        """``keys`` about their mean: a constant added to all keys changes no weight of a softmax."""
        return self.keys - torch.outer(self.key_mean, self.key_mean)


def output_energy(moments: Moments, groups: int) -> float:
    """E|output|^2 of the attention's output projection, heads taken as independent of each other; positive."""
    heads, width = moments.outputs.shape[:2]
    start = moments.values.shape[0] - groups * width
    blocks = moments.values[start:, start:].reshape(groups, width, groups, width)
    own = [blocks[head * groups // heads, :, head * groups // heads] for head in range(heads)]
    return max(float((moments.outputs * torch.stack(own)).sum()), TINY)


def measure(stage: Stage, source: Source, weight: Tensor) -> Moments:
    """The moments of ``source`` in ``stage``, which holds it. ``weight`` [D, H*v] is its output projection's."""
    sums = _Sums(source, weight)
    for sample in _samples(stage, source):
        with quick_products():
            sums.add(sample)
    return sums.finish()


@dataclass
class _Heads:
    """One sample: heads [heads, T, width] before rotation, and rotated; the rotary table, two of [T, pairs]."""

    query: Tensor
    key: Tensor
    value: Tensor
    rotated_query: Tensor
    rotated_key: Tensor
    table: tuple[Tensor, ...]


def _samples(stage: Stage, source: Source) -> Iterator[_Heads]:
    node = source.site.node
    heads = (source.query, source.key, source.value, node.input(0), node.input(1))
    table = tuple(source.table.outputs) if source.table is not None else ()
    for values in stage.values((*heads, *table)):
        for sample in range(len(values[source.query])):
            # one table serves all samples, or each has its own
            rotary = tuple(values[part].expand(sample + 1, *values[part].shape[1:])[sample] for part in table)
            query, key, value, rotated_query, rotated_key = (values[part][sample] for part in heads)
            yield _Heads(query, key, value, rotated_query, rotated_key, rotary)


class _Sums:
    """Accumulates the moments, one sample and one key/value head at a time."""

    def __init__(self, source: Source, weight: Tensor) -> None:
        self._source = source
        heads, d, v = source.heads, source.head_dim, source.value_dim
        width = source.groups * (d + v)
        columns = weight.float().reshape(-1, heads, v).permute(1, 0, 2)
        self._outputs = columns.transpose(1, 2) @ columns
        self._turns = Turns(source)
        self._weight = torch.zeros((), dtype=torch.float64)
        self._queries = torch.zeros(heads, d, d, dtype=torch.float64)
        self._keys = torch.zeros(width, width, dtype=torch.float64)
        self._key_mean = torch.zeros(width, dtype=torch.float64)
        self._values = torch.zeros(width, width, dtype=torch.float64)
        self._collision = torch.zeros(heads, dtype=torch.float64)
        self._tokens = 0

    def add(self, seen: _Heads) -> None:
        tokens = seen.key.shape[1]
        numbers = torch.cat((_side_by_side(seen.key), _side_by_side(seen.value)), -1)
        weight_of_key = torch.zeros(tokens)
        share = self._source.heads // self._source.groups
        for group in range(self._source.groups):
            own = slice(group * share, (group + 1) * share)
            attention, slope = self._attention(seen.rotated_query[own], seen.rotated_key[group])
            weights = self._weights(attention, slope, seen.value[group], own)
            weight_of_key += weights.sum((0, 1))
            self._add_queries(own, weights.sum(-1), seen.query[own])
            self._turns.add(own, weights, seen.query[own], seen.key[group], seen.table)
            self._add_values(own, attention, numbers)
            self._collision[own] += (attention * attention).sum((1, 2)).double()
        self._add_keys(weight_of_key, numbers)
        self._tokens += tokens

    def finish(self) -> Moments:
        # what the output projection drops has no weight
        total, norms = self._weight.clamp_min(TINY), self._outputs.diagonal(dim1=1, dim2=2).sum().double()
        phasor, frozen = self._turns.fitted()
        return Moments(
            phasor=phasor,
            frozen=frozen,
            queries=self._queries / self._tokens,
            keys=self._keys / total,
            key_mean=self._key_mean / total,
            values=self._values / (norms * self._tokens).clamp_min(TINY),
            outputs=self._outputs.double(),
            collision=self._collision / self._tokens,
        )

    def _attention(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weights [h, T, T] and, under a cap, the slope of the capped scores."""
        site = self._source.site
        scores, slope = query @ key.T * site.scale, None
        if site.softcap:
            bent = torch.tanh(scores / site.softcap)
            scores, slope = bent * site.softcap, 1 - bent * bent
        allowed = attention_mask(len(key), len(key), True, site.window, key.device)
        assert allowed is not None  # causal attention has a mask
        return scores.masked_fill_(~allowed, float("-inf")).softmax(-1), slope

    def _weights(self, attention: Tensor, slope: Tensor | None, value: Tensor, own: slice) -> Tensor:
        """w [h, T, T] = (a slope)^2 |W (v - o)|^2."""
        outputs = self._outputs[own]
        mean = attention @ value
        turned, mean_turned = value @ outputs, mean @ outputs
        distance = torch.baddbmm(
            (turned * value).sum(-1)[:, None], mean_turned, value.T.expand(len(mean), -1, -1), alpha=-2
        )
        distance += (mean_turned * mean).sum(-1)[..., None]
        sensitivity = attention if slope is None else attention * slope
        return distance.clamp_(min=0).mul_(sensitivity).mul_(sensitivity)

    def _add_queries(self, own: slice, weight: Tensor, query: Tensor) -> None:
        self._weight += weight.sum().double()
        self._queries[own] += ((weight[..., None] * query).transpose(1, 2) @ query).double()

    def _add_values(self, own: slice, attention: Tensor, numbers: Tensor) -> None:
        norms = self._outputs[own].diagonal(dim1=1, dim2=2).sum(1).sqrt()
        means = (norms[:, None, None] * (attention @ numbers)).flatten(0, 1)
        self._values += (means.T @ means).double()

    def _add_keys(self, weight: Tensor, numbers: Tensor) -> None:
        weighted = weight[:, None] * numbers
        self._keys += (weighted.T @ numbers).double()
        self._key_mean += weighted.sum(0).double()


def _side_by_side(heads: Tensor) -> Tensor:
    """[h, T, width] to [T, h*width]."""
    return heads.transpose(0, 1).flatten(1)
