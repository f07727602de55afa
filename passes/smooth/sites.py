"""Sites: matrices that read the same channels, and what takes a scale of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from compiler.calibration.products import products
from compiler.errors import PassError
from compiler.ir.graph import Graph, Node, Param
from compiler.pipeline import Context
from compiler.rewrite.equivariance import Blocked, Factor, Region, inner_region, region
from compiler.weights.ops.basic import full


@dataclass(frozen=True)
class Reader:
    """A selected weight, and the factor that multiplies its columns."""

    param: Param
    columns: Factor


@dataclass(frozen=True)
class Site:
    """Matrices that read the channels of one value, which ``region`` scales."""

    region: Region
    readers: tuple[Reader, ...]

    @property
    def name(self) -> str:
        """The weight that is first to read it."""
        return self.readers[0].param.name

    @property
    def absorbed_by(self) -> list[str]:
        """What takes the scale."""
        reading = {use.param for use in self.region.readers}
        return [param.name for param in self.region.factors if param not in reading]


def sites_of(graph: Graph, ctx: Context, params: Sequence[Param], *, insert: bool) -> list[Site]:
    """The sites of ``params``; weights that can be smoothed nowhere are reported as skipped.

    With ``insert``, what nothing can take is multiplied explicitly. Raises PassError when there is no site.
    """
    selected, known = set(params), products(graph)
    found: list[Site] = []
    for param in params:
        if any(param in (reader.param for reader in site.readers) for site in found):
            continue
        try:
            found.append(_site(graph, param, known.get(param, []), selected, insert))
        except Blocked as blocked:
            ctx.skipped(param.name, blocked.cause)
    if not found:
        raise PassError(
            "none of the selected weights reads channels that can be scaled",
            option="where",
            remedy="`where: linear` selects the matrices that can be",
        )
    return found


def _site(graph: Graph, param: Param, nodes: Sequence[Node], selected: set[Param], insert: bool) -> Site:
    if not nodes:
        raise Blocked(f"it is read by {', '.join(sorted({f'`{node.op.name}`' for node in param.users}))}")
    try:
        made = _region(graph, param, nodes[0])
    except Blocked:
        if not insert or nodes[0].op.name != "linear":
            raise
        made = _inserted(graph, nodes, selected)
    return Site(made, tuple(_readers(made, selected)))


def _region(graph: Graph, param: Param, node: Node) -> Region:
    if node.op.name == "experts" and node.input(4) is param:
        return inner_region(node)
    return region(graph, node.input(0), 1 if node.op.name == "conv" else -1)


def _readers(made: Region, selected: set[Param]) -> Iterator[Reader]:
    for param in dict.fromkeys(use.param for use in made.readers):
        axis = next(use.axis for use in made.readers if use.param is param)
        columns = next(f for f in made.factors[param] if f.labels.shape[axis] > 1 or len(made.factors[param]) == 1)
        if param in selected:
            yield Reader(param, columns)


def _inserted(graph: Graph, nodes: Sequence[Node], selected: set[Param]) -> Region:
    """Multiply what selected linear maps read by a vector of ones, which can take the scale."""
    value = nodes[0].input(0)
    readers = [node for node in value.users if node.op.name == "linear" and node.input(0) is value]
    readers = [node for node in readers if node.input(1) in selected and len(node.input(1).users) == 1]
    if nodes[0] not in readers:
        raise Blocked("it is shared")
    width = value.type.shape[-1]
    if not isinstance(width, int):
        raise Blocked("its width is known to the inputs only")
    first = next(node for node in graph.nodes if node in readers)
    weight = graph.params[first.input(1).name]
    name = f"{weight.name.removesuffix('.weight')}.input_scale"
    vector = graph.add_param(name, full((width,), 1.0, torch.float32), weight.storage, dtype=weight.type.dtype)
    made = graph.op("mul", [value, vector], scope=first.scope, before=first)
    for node in readers:
        graph.set_input(node, 0, made)
    return region(graph, made)
