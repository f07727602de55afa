"""Calibration: activations layer by layer, with one layer's weights in memory.

``sweep`` walks the graph a layer at a time over all calibration batches. A pass observes a layer, may rewrite it, and
the sweep runs the rewritten layer to feed the next one, so later layers are measured on what they will really see.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compiler.errors import DataError
from compiler.ir.execute import bind_dims, read_param, run_nodes
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import segments

NARROW_NUMBERS = 1 << 16  # of a weight: products with smaller ones take no time


@dataclass
class _Batch:
    """The live values of one calibration batch, and the sizes of its symbolic dims."""

    values: dict[Value, Tensor]
    sizes: Mapping[str, int]


@dataclass
class Stage:
    """One layer (or what stands before, between or after layers, with scope "") and the activations that enter it."""

    scope: str
    nodes: list[Node]
    _graph: Graph = field(repr=False)
    _batches: list[_Batch] = field(repr=False)
    _end: Node | None = field(repr=False)
    _done: set[Node] = field(repr=False)
    _exact: bool = field(repr=False)

    def refresh(self) -> None:
        """Take note of nodes that were put into the stage or taken out of it."""
        before = takewhile(lambda node: node is not self._end, self._graph.nodes)
        self.nodes = [node for node in before if node not in self._done]

    def observe(self, see: Callable[[Value, Tensor], None]) -> None:
        """Run the stage on every batch; ``see`` gets every value that enters it or is computed in it."""
        for batch in self._run(see=see):
            del batch

    def values(self, wanted: Sequence[Value]) -> Iterator[dict[Value, Tensor]]:
        """Per batch, the values in ``wanted``, which enter the stage or are computed in it; no further node is run."""
        makers = {value.node for value in wanted}
        last = max((index for index, node in enumerate(self.nodes) if node in makers), default=-1)
        for values in self._run(keep=wanted, nodes=self.nodes[: last + 1]):
            yield {value: values[value] for value in wanted}

    def outputs(self) -> list[Value]:
        """What the stage computes for later stages or for the user of the graph, in order."""
        inside, results = set(self.nodes), set(self._graph.outputs.values())
        made = (value for node in self.nodes for value in node.outputs)
        return [value for value in made if value in results or not value.users.keys() <= inside]

    def function(self, wanted: Sequence[Value]) -> Callable[[int, Mapping[Value, Tensor]], list[Tensor]]:
        """A function of a batch's number and of values for some parameters that computes ``wanted`` on that batch.

        It can be differentiated by those values. The stage's other weights are read once, now.
        """
        read = (value for node in self.nodes for value in node.inputs)
        weights = {value: read_param(self._graph, value) for value in read if isinstance(value, Param)}
        nodes = list(self.nodes)

        def compute(index: int, given: Mapping[Value, Tensor]) -> list[Tensor]:
            batch = self._batches[index]
            values = {**batch.values, **weights, **given}
            run_nodes(self._graph, nodes, values, batch.sizes, keep=wanted)
            return [values[value] for value in wanted]

        return compute

    def _run(
        self,
        *,
        keep: Sequence[Value] = (),
        nodes: Sequence[Node] | None = None,
        see: Callable[[Value, Tensor], None] | None = None,
    ) -> Iterator[dict[Value, Tensor]]:
        """Per batch, the live values after ``nodes``, which are the stage's unless others are given."""
        nodes = self.nodes if nodes is None else nodes
        read = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
        read_weight = read_param if self._exact else quick_weight
        weights = {value: read_weight(self._graph, value) for value in read if isinstance(value, Param)}
        for batch in self._batches:
            for value in read:
                if see is not None and value in batch.values:
                    see(value, batch.values[value])
            values = {**batch.values, **weights}
            with torch.no_grad(), nullcontext() if self._exact else quick_products():
                run_nodes(self._graph, nodes, values, batch.sizes, keep=(*keep, *weights), observe=see)
            yield {value: tensor for value, tensor in values.items() if value not in weights}

    def reach(self, node: Node) -> None:
        """Run what comes before ``node`` for good: it is not run again, so nothing of it may be rewritten any more."""
        self.refresh()
        before = list(takewhile(lambda other: other is not node, self.nodes))
        self._pass(before)
        self.nodes = self.nodes[len(before) :]

    def advance(self) -> None:
        """Replace the live values of every batch by those after the stage."""
        self.refresh()
        self._pass(self.nodes)

    def _pass(self, nodes: Sequence[Node]) -> None:
        """Replace the live values of every batch by those after ``nodes``."""
        run = self._done | set(nodes)
        outputs = set(self._graph.outputs.values())
        known = {value for batch in self._batches for value in batch.values}
        known.update(value for node in nodes for value in node.outputs)
        keep = [value for value in known if value in outputs or not value.users.keys() <= run]
        for batch, values in zip(self._batches, self._run(keep=keep, nodes=nodes), strict=True):
            batch.values = {value: values[value] for value in keep if value in values}
        self._done.update(nodes)


def quick_weight(graph: Graph, param: Param) -> Tensor:
    """The value of ``param``; a large one that linear maps alone read is in bfloat16, where the processor gains by it.

    What it is multiplied with is rounded to bfloat16 too, and products are summed in float32: activations keep two to
    three digits, which is more than a choice of calibration texts leaves of what is measured on them.
    """
    tensor = read_param(graph, param)
    return tensor.bfloat16() if has_narrow_products() and _only_multiplied(param) else tensor


def _only_multiplied(param: Param) -> bool:
    """Whether ``param`` is a large float32 matrix that linear maps alone read."""
    large = param.type.dtype == torch.float32 and param.type.numel >= NARROW_NUMBERS
    return large and all(node.op.name == "linear" and node.inputs.index(param) == 1 for node in param.users)


@cache
def has_narrow_products() -> bool:
    """Whether this processor multiplies bfloat16 in instructions of its own, twice as fast as float32."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@contextmanager
def quick_products() -> Generator[None]:
    """Let float32 matrix products take the quickest kernels: activations that are only measured need no last bit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def sweep(graph: Graph, batches: Sequence[Mapping[str, Tensor]], *, exact: bool = False) -> Iterator[Stage]:
    """The stages of ``graph`` in order, each with the activations that ``batches`` (inputs by name) have there.

    The caller may rewrite the nodes of the stage at hand, and nodes before it whose inputs are still read by it; what
    then stands in its place is run before the next stage is yielded. Activations of all batches stay in memory.
    Unless it is to be ``exact``, products take the quickest kernels, and large linear maps a `quick_weight`.
    """
    state = [
        _Batch({value: batch[name] for name, value in graph.inputs.items()}, bind_dims(graph, batch))
        for batch in batches
    ]
    parts = segments(graph)
    ends = [nodes[0] for _, nodes in parts[1:]] + [None]
    done: set[Node] = set()
    for (layer, nodes), end in zip(parts, ends, strict=True):
        stage = Stage(layer.scope if layer else "", nodes, graph, state, end, done, exact)
        yield stage
        stage.advance()


def differentiable(
    graph: Graph,
    batch: Mapping[str, Tensor],
    weights: Mapping[Value, Tensor],
    observe: Callable[[Value, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """The outputs of ``graph`` for ``batch``, with ``weights`` for its parameters, by which they can be differentiated.

    Between layers activations are kept, within them they are computed again on the way back. ``observe`` sees every
    value that is computed, those of layers once more on the way back.
    """
    sizes = bind_dims(graph, batch)
    live: dict[Value, Tensor] = {value: batch[name] for name, value in graph.inputs.items()}
    done: set[Node] = set()
    results = set(graph.outputs.values())
    for _, nodes in segments(graph):
        done.update(nodes)
        made = (value for node in nodes for value in node.outputs)
        keep = [value for value in (*live, *made) if value in results or not value.users.keys() <= done]
        live = checkpoint(_segment, graph, nodes, live, weights, sizes, keep, observe, use_reentrant=False)
    return {name: live[value] for name, value in graph.outputs.items()}


def _segment(
    graph: Graph,
    nodes: Sequence[Node],
    live: Mapping[Value, Tensor],
    weights: Mapping[Value, Tensor],
    sizes: Mapping[str, int],
    keep: Sequence[Value],
    observe: Callable[[Value, Tensor], None] | None,
) -> dict[Value, Tensor]:
    """The values in ``keep`` after ``nodes``, which start from those in ``live``."""
    values = {**live, **weights}
    run_nodes(graph, nodes, values, sizes, keep=keep, observe=observe)
    return {value: values[value] for value in keep}


def token_batches(graph: Graph, windows: Tensor) -> list[dict[str, Tensor]]:
    """Token windows, int64 [samples, length], as inputs of ``graph``, one at a time.

    Raises DataError when the graph takes anything but one tensor of token ids.
    """
    if list(graph.inputs) != ["input_ids"]:
        cause = f"a text cannot calibrate a model whose inputs are {', '.join(graph.inputs)}"
        raise DataError(cause, remedy="calibrate it on data of the kind that it takes")
    return [{"input_ids": part} for part in windows.split(1)]
