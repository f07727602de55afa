"""Turn the residual stream to its principal components, so that what carries least lies along axes of its own.

The basis is that of the second moments of all normed inputs, summed over those who read them (SliceGPT, arXiv
2401.15024): their last components are what can go. Which of them does go is then decided as for any other dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compiler.calibration.moments import measure
from compiler.calibration.products import products
from compiler.ir.coupling import CouplingGroup, coupling_groups
from compiler.ir.graph import Graph, Param
from compiler.pipeline import Context
from compiler.rewrite.rotation import turn, unscale
from compiler.rewrite.stream import Stream, residual

Batches = Sequence[Mapping[str, Tensor]]


def turned(graph: Graph, ctx: Context, batches: Batches) -> None:
    """Turn every residual stream that can be narrower. Raises PassError where scales of norms stand before one."""
    before = {param: param.expr for param in graph.params.values()}
    for number in range(len(_streams(graph))):
        for name, head in unscale(graph, _streams(graph)[number]).items():
            ctx.rewrote(head.name, f"has a matrix of its own, not {name}: its norm's scale is in it")
        group = _streams(graph)[number]
        turn(graph, group, ctx.spill("basis", _basis(graph, ctx, group, batches)))
    for param in graph.params.values():
        if before.get(param) != param.expr:
            param.expr = ctx.spill(param.name, ctx.value(param.expr).to(param.storage))


def _streams(graph: Graph) -> list[CouplingGroup]:
    return [group for group in coupling_groups(graph) if residual(group) and not group.frozen]


def _basis(graph: Graph, ctx: Context, group: CouplingGroup, batches: Batches) -> Tensor:
    """The eigenvectors [n, n] of the second moments of what is read, largest first, float64."""
    if ctx.planned:
        return torch.empty(group.size, group.size, dtype=torch.float64, device="meta")
    known = products(graph)
    readers: dict[object, Param] = {}
    for use in Stream.of(graph, group).readers:
        if use.param in known:
            readers.setdefault(use.node.input(0), use.param)
    found = measure(graph, list(readers.values()), batches, ctx.progress)
    seconds = [found.of(param).second for param in readers.values()]
    total = sum((second.mean(0) if second.ndim == 3 else second for second in seconds), torch.zeros(()))
    return torch.linalg.eigh(total).eigenvectors.flip(1)
