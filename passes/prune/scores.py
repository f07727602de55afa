"""The ranking of every place by the score that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compiler.calibration.moments import Moments, Statistics, cost
from compiler.errors import PassError
from compiler.ir.coupling import Member
from compiler.ir.graph import Param
from compiler.pipeline import Context
from passes.prune.places import Place
from passes.prune.ranking import Ranking, Reader, by_size, in_metric, summed, surgeon


class Scores:
    """Ranks places by ``score``. ``statistics`` are those of their readers; None for scores of weights alone."""

    def __init__(
        self,
        ctx: Context,
        score: str,
        statistics: Statistics | None,
        slopes: Mapping[Param, Tensor] | None = None,
    ) -> None:
        self._ctx = ctx
        self._slopes = slopes or {}
        self._score = score
        self._statistics = statistics
        self._measured = {param.name: param for param in statistics.params} if statistics else {}

    def readers(self, place: Place) -> list[Reader]:
        """The matrices that read ``place``: those of a stack one by one. By slopes, one for each input is enough."""
        members = {self._input(member): member for member in place.readers}.values()
        return [reader for member in members for reader in self.split(place, member)]

    def _input(self, member: Member) -> object:
        return next(iter(member.param.users)).input(0) if member.param in self._slopes else member

    def split(self, place: Place, member: Member) -> list[Reader]:
        """The matrices of one reader: of experts there are several. With a bias, the mean of inputs costs nothing.

        ``place`` may be of a copy of the graph that was measured.
        """
        weight, columns = self._ctx.read(member.param), place.columns(member)
        known = self._measured.get(member.param.name)
        moments = self._statistics.of(known) if known is not None and self._statistics else None
        if not any(node.op.name == "experts" for node in member.param.users):
            if moments is not None and bias_of(member.param) is not None:
                moments = replace(moments, second=moments.second - torch.outer(moments.mean, moments.mean))
            return [Reader(weight.flatten(1), columns, moments, slope=self._slopes.get(member.param))]
        stack = enumerate(weight)
        return [Reader(matrix, columns, None if moments is None else moments.of_expert(e)) for e, matrix in stack]

    def rank(self, place: Place) -> Ranking:
        if place.kind == "experts":
            return self._experts(place)
        if place.kind == "hidden" and self._score == "loss" and self._statistics is not None:
            return surgeon(self._pooled(place), place.size)
        readers = self.readers(place)
        if place.outer is not None:
            return self._heads(place, readers, place.outer.size)
        if self._score == "loss" and all(reader.moments for reader in readers):
            return surgeon(readers, place.size)
        return by_size(self._sizes(place, readers))

    def _pooled(self, place: Place) -> list[Reader]:
        """What reads the same vectors, as one matrix: an error E costs them 1/2 tr(E C E^T G), G = sum of W^T M W."""
        found: dict[object, tuple[Moments, Tensor]] = {}
        for member in place.readers:
            for reader in self.split(place, member):
                if reader.moments is None:
                    continue
                key = next(iter(member.param.users)).input(0), bias_of(member.param) is None
                moments, gram = found.get(key, (reader.moments, torch.zeros(())))
                weighted = in_metric(reader.weight.double(), reader.moments.gradient)
                found[key] = moments, gram + weighted.T @ weighted
        columns = [[index] for index in range(place.size)]
        return [Reader(_root(gram), columns, replace(m, gradient=None)) for m, gram in found.values()]

    def _sizes(self, place: Place, readers: Sequence[Reader]) -> Tensor:
        """A number for each index, by the columns of all readers and, for magnitudes, by all members' weights."""
        if self._score == "magnitude":
            return torch.stack([_energy(self._ctx.read(m.param), m, place.size) for m in place.group.members]).sum(0)
        return self._columns(readers, place.size)

    def _columns(self, readers: Sequence[Reader], size: int) -> Tensor:
        total = torch.zeros(size, dtype=torch.float64)
        for reader in readers:
            energy = _by_column(reader, self._score)
            total += torch.stack([energy[list(columns)].sum() for columns in reader.columns])
        return total

    def _experts(self, place: Place) -> Ranking:
        """By what the model loses without an expert (`loss`), or by the size of its weights."""
        if self._score == "magnitude" or self._statistics is None:
            return by_size(_energy(self._ctx.read(place.readers[0].param), place.group.members[0], place.size))
        param = place.readers[0].param
        moments = self._statistics.of(param)
        seen = moments.count / moments.count.sum()
        lost = seen * torch.stack([cost(w, moments.of_expert(e)) for e, w in enumerate(self._ctx.read(param))])
        return summed(lost)

    def _heads(self, place: Place, readers: Sequence[Reader], outer: int) -> Ranking:
        """Within each group the heads that matter least come last, and go in all groups at once."""
        known = self._score == "loss" and all(reader.moments for reader in readers)
        single = [reader.finer(outer) for reader in readers]
        count = place.size * outer
        order = (surgeon(single, count) if known else by_size(self._columns(single, count))).order
        ranks = {index: rank for rank, index in enumerate(order)}
        rows = tuple(
            tuple(sorted(range(place.size), key=lambda head: ranks[group * place.size + head]))
            for group in range(outer)
        )
        moved = [reader.reordered(rows) for reader in readers]
        first = tuple(range(place.size))
        losses = surgeon(moved, place.size, first).losses if known else torch.zeros(place.size + 1)
        return Ranking(first, losses, rows)


def check_slopes(score: str, places: Sequence[Place]) -> None:
    """Raises PassError where ``score`` goes by slopes and a place is read by experts, which have none of their own."""
    readers = (member.param for place in places for member in place.readers)
    if score == "taylor" and any(node.op.name == "experts" for param in readers for node in param.users):
        raise PassError(
            "what experts hold inside has no slope of its own", option="score", remedy="leave `score` out for experts"
        )


def _root(gram: Tensor) -> Tensor:
    """R [n, n] with R^T R = ``gram``."""
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def bias_of(param: Param) -> Param | None:
    """The bias of the one linear map or convolution of ``param``, if it is no other's."""
    node = next(iter(param.users))
    bias = node.optional_input(2) if len(param.users) == 1 and node.op.name in ("linear", "conv") else None
    return bias if isinstance(bias, Param) and len(bias.users) == 1 else None


def _by_column(reader: Reader, score: str) -> Tensor:
    """Of each column of a reader: norms of weights times those of inputs, or the energy that fluctuates."""
    if score == "taylor":
        return _slope(reader)
    energy = reader.weight.double().square().sum(0)
    if reader.moments is None or score == "magnitude":
        return energy
    second = reader.moments.second.diagonal()
    if score == "activation":
        return reader.weight.double().abs().sum(0) * second.sqrt()
    return energy * (second - reader.moments.mean.square()).clamp_min(0)


def _slope(reader: Reader) -> Tensor:
    """The slope of every column: of a convolution's window, all of them have an equal share of it."""
    assert reader.slope is not None  # see check_slopes
    window = reader.weight.shape[1] // len(reader.slope)
    return reader.slope.repeat_interleave(window) / window


def _energy(weight: Tensor, member: Member, size: int) -> Tensor:
    """The squares of ``weight`` summed for each index of a group, float64 [size]."""
    rows = weight.double().square().movedim(member.axis, 0).reshape(weight.shape[member.axis], -1).sum(1)
    return rows.reshape(-1, size, member.stride).sum((0, 2))
