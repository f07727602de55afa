"""Second moments at products with weights, and what an error in a weight costs by them.

y = W x. To second order, an error E of W costs

    1/2 tr(M E C E^T),  C = E[x x^T],  M = sum of g g^T over all x, divided by the number of predictions,

g being the gradient of the model's own loss at y. Of logits the loss is that of labels drawn from the model's own
distribution (the Fisher information), and the cost is the divergence KL(original || changed) in nats per prediction; of
other outputs g is the gradient of a random signed sum, and the cost is the mean square error relative to the
output's energy: the units of ``compiler.calibration.fidelity``. It is taken that x and g are independent, and so are
the errors of different tokens: Kronecker-factored curvature (K-FAC, Martens and Grosse, arXiv 1503.05671), for
weights that meet every token in its "expand" form (Eschenhagen et al., arXiv 2311.00636).

Memory: C is measured a layer at a time, with the activations of all batches there. M is measured by whole passes
through the model, with at most ``GRADIENT_BYTES`` of sums at a time, in as many passes as that takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from compiler.calibration.products import Rows, entering, leaving, matrix_shape, products, reads
from compiler.calibration.sweep import Stage, differentiable, quick_products, sweep
from compiler.ir.execute import read_param
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.weights.spill import Progress

FULL_WIDTH = 2048  # of outputs; of wider ones only the diagonal of M is kept
GRADIENT_BYTES = 2 << 30
RESIDENT_BYTES = 4 << 30  # weights up to this much stay in memory while gradients are taken
BLOCK = 4096  # vectors whose products are summed in float32, before they go into a sum in float64

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Moments:
    """What calibration says of the products with one weight [out, in], or with each of a stack [experts, out, in].

    All float64; a stack's have an axis of experts in front. ``count`` [] of vectors seen, ``mean`` [in] of them,
    ``second`` [in, in] their second moment C (both zero where nothing was seen), and ``gradient`` M [out, out], or its
    diagonal [out] for outputs wider than ``FULL_WIDTH``, or None when it was not asked for. ``magnitude`` and
    ``largest`` [in] are the mean and the maximum of the elements' magnitudes.
    """

    count: Tensor
    mean: Tensor
    second: Tensor
    gradient: Tensor | None = None
    magnitude: Tensor | None = None
    largest: Tensor | None = None

    def of_expert(self, expert: int) -> Moments:
        """The moments of one matrix of a stack."""
        others = (self.gradient, self.magnitude, self.largest)
        own = (None if tensor is None else tensor[expert] for tensor in others)
        return Moments(self.count[expert], self.mean[expert], self.second[expert], *own)


class Statistics:
    """The moments of the weights that were measured, read when asked for."""

    def __init__(self, store: Store, inputs: Mapping[Param, Sequence[str]], gradients: Mapping[Param, str]) -> None:
        self._store = store
        self._inputs = inputs
        self._gradients = gradients

    def __contains__(self, param: Param) -> bool:
        return param in self._inputs

    def of(self, param: Param) -> Moments:
        """The moments of ``param``, over all the products with it."""
        gradient = self._store.load(self._gradients[param])["gradient"] if param in self._gradients else None
        return _moments(param, [self._store.load(name) for name in self._inputs[param]], gradient)


class Store:
    """Bundles of tensors by name, in ``progress`` or, where that keeps nothing, in memory."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._memory: dict[str, dict[str, Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._memory or self._progress.load(name) is not None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._progress.save(name, tensors)
        if self._progress.load(name) is None:
            self._memory[name] = dict(tensors)

    def load(self, name: str) -> dict[str, Tensor]:
        return self._memory[name] if name in self._memory else self._progress.load(name) or {}


def measure(
    graph: Graph,
    params: Sequence[Param],
    batches: Batches,
    progress: Progress,
    *,
    gradients: Batches = (),
    seed: int = 0,
) -> Statistics:
    """The moments of ``params`` on ``batches`` (inputs by name), and M on ``gradients`` where there are any.

    Weights that ``compiler.calibration.products`` finds no product with are left out. What ``progress`` holds is not
    measured again. Labels and signs are drawn with ``seed``.
    """
    nodes = {param: found for param, found in products(graph).items() if param in set(params)}
    key = key_of(graph, nodes, batches, gradients, seed)
    store = Store(progress)
    inputs = _measure_inputs(graph, nodes, batches, store, key)
    names = {param: f"gradient-{key}-{index}" for index, param in enumerate(nodes)} if gradients else {}
    missing = [param for param in names if names[param] not in store]
    for part in _within_memory(missing):
        for param, found in _gradients(graph, {param: nodes[param] for param in part}, gradients, seed).items():
            store.save(names[param], {"gradient": found})
    return Statistics(store, inputs, names)


def at_stage(
    graph: Graph, stage: Stage, params: Sequence[Param], counts: Sequence[Tensor] | None = None
) -> dict[Param, Moments]:
    """The moments of ``params`` over their products in ``stage`` of a sweep, on what enters them there now; without M.

    ``counts``, a tensor [vectors] a batch, says by how much each vector counts, if not alike.
    Raises KeyError for a weight that ``compiler.calibration.products`` finds no product with.
    """
    known, inside = products(graph), set(stage.nodes)
    nodes = {param: [node for node in known[param] if node in inside] for param in params}
    places, inputs = _distinct(nodes, "")
    bundles = {name: sums.bundle() for name, sums in _sums(graph, stage, places, counts).items()}
    return {param: _moments(param, [bundles[name] for name in names], None) for param, names in inputs.items()}


def _moments(param: Param, bundles: Sequence[Mapping[str, Tensor]], gradient: Tensor | None) -> Moments:
    """The moments of ``param`` from sums over parts of its products."""
    whole = {key: torch.stack([bundle[key] for bundle in bundles]) for key in _Sums.KEYS}
    count, first, second, sizes = (whole[key].sum(0) for key in _Sums.KEYS[:4])
    seen = count.clamp_min(1)[:, None]
    found = Moments(count, first / seen, second / seen[..., None], gradient, sizes / seen, whole["largest"].amax(0))
    return found if _stacked(param) else found.of_expert(0)


def key_of(graph: Graph, nodes: Mapping[Param, object], batches: Batches, gradients: Batches, seed: int) -> str:
    """A name that changes with the model, the weights that are measured, and the data."""
    digest = hashlib.sha256(f"{seed} {len(batches)}".encode())
    for param in graph.params.values():
        digest.update(f"{param.name} {param.expr.key} {param in nodes}\n".encode())
    for batch in (*batches, *gradients):
        for name, tensor in batch.items():
            digest.update(f"{name} {tuple(tensor.shape)} {float(tensor.double().sum())}".encode())
    return digest.hexdigest()[:16]


# --- what enters ---------------------------------------------------------------------------------------------


class _Sums:
    """Sums over vectors, in float64, and the largest magnitudes, for each of a number of experts."""

    KEYS = ("count", "first", "second", "sizes", "largest")

    def __init__(self, experts: int, width: int) -> None:
        self.count = torch.zeros(experts, dtype=torch.float64)
        self.first = torch.zeros(experts, width, dtype=torch.float64)
        self.second = torch.zeros(experts, width, width, dtype=torch.float64)
        self.sizes = torch.zeros(experts, width, dtype=torch.float64)
        self.largest = torch.zeros(experts, width, dtype=torch.float64)

    def add(self, rows: Rows, counts: Tensor | None) -> None:
        for expert, vectors in rows:
            weighed = vectors if counts is None else vectors * counts[:, None]
            self.count[expert] += len(vectors) if counts is None else counts.sum()
            self.first[expert] += weighed.sum(0, dtype=torch.float64)
            self.sizes[expert] += weighed.abs().sum(0, dtype=torch.float64)
            self.largest[expert] = torch.maximum(self.largest[expert], vectors.abs().amax(0).double())
            for block, own in zip(vectors.split(BLOCK), weighed.split(BLOCK), strict=True):
                self.second[expert] += own.T @ block

    def bundle(self) -> dict[str, Tensor]:
        return {key: getattr(self, key) for key in self.KEYS}


def _measure_inputs(
    graph: Graph, nodes: Mapping[Param, Sequence[Node]], batches: Batches, store: Store, key: str
) -> dict[Param, list[str]]:
    """The bundles of every weight."""
    places, inputs = _distinct(nodes, f"inputs-{key}-")
    missing = [place for place in places if place[0] not in store]
    if missing:
        for stage in sweep(graph, batches):
            position = {node: index for index, node in enumerate(stage.nodes)}
            own = sorted((place for place in missing if place[1] in position), key=lambda place: position[place[1]])
            for place in own:
                stage.reach(place[1])
                for name, sums in _sums(graph, stage, [place]).items():
                    store.save(name, sums.bundle())
            missing = [place for place in missing if place not in own]
            if not missing:
                break
    return inputs


def _distinct(
    nodes: Mapping[Param, Sequence[Node]], prefix: str
) -> tuple[list[tuple[str, Node, Param]], dict[Param, list[str]]]:
    """Products that meet different vectors, each with a name, and every weight's names: one for those that share."""
    places: dict[tuple[object, ...], tuple[str, Node, Param]] = {}
    inputs: dict[Param, list[str]] = {}
    for param, users in nodes.items():
        for node in users:
            place = places.setdefault(_vectors(node, param), (f"{prefix}{len(places)}", node, param))
            inputs.setdefault(param, []).append(place[0])
    return list(places.values()), inputs


def _vectors(node: Node, param: Param) -> tuple[object, ...]:
    """Equal for products that meet the same vectors."""
    if node.op.name == "linear":
        return (node.input(0),)
    return node, node.inputs.index(param)


def _sums(
    graph: Graph,
    stage: Stage,
    places: Sequence[tuple[str, Node, Param]],
    counts: Sequence[Tensor] | None = None,
) -> dict[str, _Sums]:
    if not places:
        return {}
    sums = {name: _Sums(*_groups(param)) for name, _, param in places}
    wanted = list(dict.fromkeys(value for _, node, _ in places for value in reads(node)))
    weights = _stacks(graph, [node for _, node, _ in places])
    for batch, values in enumerate(stage.values(wanted)):
        with quick_products():
            for name, node, param in places:
                rows = entering(node, param, {**values, **weights})
                sums[name].add(rows, None if counts is None else counts[batch])
    return sums


def _groups(param: Param) -> tuple[int, int]:
    experts, _, columns = matrix_shape(param)
    return experts, columns


def _stacks(graph: Graph, nodes: Sequence[Node]) -> dict[Value, Tensor]:
    """The values of the weights of experts, without which what goes on inside of them is not known."""
    read = (value for node in nodes if node.op.name == "experts" for value in node.inputs[3:])
    return {value: read_param(graph, value) for value in read if isinstance(value, Param)}


def _stacked(param: Param) -> bool:
    return any(node.op.name == "experts" for node in param.users)


# --- gradients at what leaves ------------------------------------------------------------------------------


def _within_memory(params: Sequence[Param]) -> list[list[Param]]:
    """``params`` in runs whose sums take at most ``GRADIENT_BYTES``, or that are of one weight."""
    parts: list[list[Param]] = []
    free = 0
    for param in params:
        size = 8 * _gradient_sum(param).numel()
        if size > free or not parts:
            parts.append([])
            free = GRADIENT_BYTES
        parts[-1].append(param)
        free -= size
    return parts


def _gradient_sum(param: Param, device: str = "meta") -> Tensor:
    experts, rows, _ = matrix_shape(param)
    shape = (experts, rows, rows) if rows <= FULL_WIDTH else (experts, rows)
    return torch.zeros(shape, dtype=torch.float64, device=device)


class Tape(Protocol):
    """What sees every value of a run forward and back; ``samples`` is the size of the batch at hand."""

    forward: bool
    samples: int

    def see(self, value: Value, tensor: Tensor) -> None:
        """``tensor`` is computed."""
        ...

    def done(self) -> None:
        """A batch has been run forward and back."""
        ...


class _Tape:
    """Sees a differentiable run, and adds up the gradients at the outputs of products on the way back."""

    def __init__(self, graph: Graph, nodes: Mapping[Param, Sequence[Node]]) -> None:
        self.sums = {param: _gradient_sum(param, "cpu") for param in nodes}
        self.forward = True
        self.samples = 1
        self._products: dict[Node, list[Param]] = {}
        for param, users in nodes.items():
            for node in users:
                self._products.setdefault(node, []).append(param)
        stacks = [node for node in self._products if node.op.name == "experts"]
        self._weights = _stacks(graph, stacks)
        self._read = {value for node in stacks for value in reads(node)}
        self._known: dict[Value, Tensor] = {}

    def see(self, value: Value, tensor: Tensor) -> None:
        if value in self._read and self.forward:
            self._known[value] = tensor.detach()
        node = value.node
        if node not in self._products:
            return
        if not tensor.requires_grad:
            tensor.requires_grad_()
        if self.forward:
            tensor.register_hook(partial(self._add, node))

    def done(self) -> None:
        self._known.clear()

    def _add(self, node: Node, gradient: Tensor) -> None:
        with torch.no_grad():
            for param in self._products[node]:
                for expert, rows in leaving(node, param, gradient.detach(), {**self._known, **self._weights}):
                    total = self.sums[param]
                    total[expert] += rows.square().sum(0) if total.ndim == 2 else rows.T @ rows


def _gradients(graph: Graph, nodes: Mapping[Param, Sequence[Node]], batches: Batches, seed: int) -> dict[Param, Tensor]:
    tape = _Tape(graph, nodes)
    predictions = backwards(graph, batches, seed, tape)
    return {param: total / predictions for param, total in tape.sums.items()}


def backwards(graph: Graph, batches: Batches, seed: int, tape: Tape) -> float:
    """Run ``batches`` forward and back before the eyes of ``tape``. Returns for how many predictions that counts."""
    source = torch.Generator().manual_seed(seed)
    held = sum(param.type.numel * 4 for param in graph.params.values()) <= RESIDENT_BYTES
    weights: dict[Value, Tensor] = {p: read_param(graph, p) for p in graph.params.values()} if held else {}
    name = next(iter(graph.outputs))
    predictions = 0.0
    for batch in batches:
        tape.forward, tape.samples = True, len(next(iter(batch.values())))
        with quick_products():
            output = differentiable(graph, batch, weights, observe=tape.see)[name]
            tape.forward = False
            gradient, count = _at_output(output.detach().float(), name == "logits", source)
            if output.requires_grad:
                output.backward(gradient.to(output.dtype))
        tape.done()
        predictions += count
    return predictions


def _at_output(output: Tensor, logits: bool, source: torch.Generator) -> tuple[Tensor, float]:
    """A draw of the gradient at the output, and how many predictions it counts for: see the module's docstring."""
    if not logits:
        signs = torch.randint(0, 2, output.shape, generator=source).to(output) * 2 - 1
        return signs, float(output.double().square().sum()) / 2
    chances = output.softmax(-1).reshape(-1, output.shape[-1])
    labels = torch.multinomial(chances, 1, generator=source)
    return chances.scatter_add(1, labels, -torch.ones_like(chances[:, :1])).view(output.shape), float(len(chances))


# --- what an error costs -----------------------------------------------------------------------------------


def cost(error: Tensor, moments: Moments) -> Tensor:
    """1/2 tr(M E C E^T) of an error E [.., out, in] in the weight, float64, one for each expert. Without M, M is 1."""
    error = error.double()
    moved = error @ moments.second
    if moments.gradient is None:
        return 0.5 * (moved * error).sum((-2, -1))
    diagonal = moments.gradient.ndim == error.ndim - 1
    weighted = moments.gradient[..., None] * error if diagonal else moments.gradient @ error
    return 0.5 * (moved * weighted).sum((-2, -1))
