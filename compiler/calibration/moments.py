"""Second moments at products with weights, and what an error in a weight costs by them.

y = W x. To second order, an error E of W costs

    1/2 tr(M E C E^T),  C = E[x x^T],  M = sum of g g^T over all x, divided by the number of predictions,

g being the gradient of the model's own loss at y. Of logits the loss is that of labels drawn from the model's own
distribution (the Fisher information), and the cost is the divergence KL(original || changed) in nats per prediction; of
other outputs g is the gradient of a random signed sum, and the cost is the mean square error relative to the
output's energy: the units of ``compiler.calibration.fidelity``. It is taken that x and g are independent, and so are
the errors of different tokens: Kronecker-factored curvature (K-FAC, Martens and Grosse, arXiv 1503.05671), for
weights that meet every token in its "expand" form (Eschenhagen et al., arXiv 2311.00636).

Memory: C is measured a layer at a time, with the activations of all batches there; M as ``gradients`` beside this says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.calibration.backward import Batches
from compiler.calibration.gradients import at_outputs
from compiler.calibration.gram import gram
from compiler.calibration.products import Rows, entering, expert_weights, matrix_shape, products, reads
from compiler.calibration.sweep import Stage, quick_products, sweep
from compiler.ir.graph import Graph, Node, Param
from compiler.weights.spill import Progress

BLOCK = 4096  # vectors whose products are summed in float32, at most, before they go into a sum in float64
ENOUGH = 1024  # vectors, or as many as they are wide: fewer wait for others, as each such sum has to be added up


@dataclass(frozen=True)
class Moments:
    """What calibration says of the products with one weight [out, in], or with each of a stack [experts, out, in].

    All float64; a stack's have an axis of experts in front. ``count`` [] of vectors seen, ``mean`` [in] of them,
    ``second`` [in, in] their second moment C (both zero where nothing was seen), and ``gradient`` M [out, out], or its
    diagonal [out] for outputs wider than ``gradients.FULL_WIDTH``, or None when it was not asked for. ``magnitude`` and
    ``largest`` [in] are the mean and the maximum of the elements' magnitudes; ``at_stage`` leaves them out.
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

    def joined(self, other: Moments) -> Moments:
        """The moments of the vectors of both, without M and magnitudes."""
        share = self.count / (self.count + other.count).clamp_min(1)
        mean = torch.lerp(other.mean, self.mean, share[..., None])
        return Moments(self.count + other.count, mean, torch.lerp(other.second, self.second, share[..., None, None]))


class Statistics:
    """The moments of the weights that were measured, read when asked for."""

    def __init__(self, store: Store, inputs: Mapping[Param, Sequence[str]], gradients: Mapping[Param, str]) -> None:
        self._store = store
        self._inputs = inputs
        self._gradients = gradients

    def __contains__(self, param: Param) -> bool:
        return param in self._inputs

    @property
    def params(self) -> list[Param]:
        return list(self._inputs)

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
        if not self._progress.keeps:
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
    for param, found in at_outputs(graph, {param: nodes[param] for param in missing}, gradients, seed):
        store.save(names[param], {"gradient": found})
    return Statistics(store, inputs, names)


def at_stage(
    graph: Graph,
    stage: Stage,
    params: Sequence[Param],
    counts: Sequence[Tensor] | None = None,
    batches: Container[int] | None = None,
) -> dict[Param, Moments]:
    """The moments of ``params`` over their products in ``stage`` of a sweep, on what enters them there now.

    They are without M and without magnitudes.

    ``counts``, a tensor [vectors] a batch, says by how much each vector counts, if not alike; ``batches`` which of
    them count at all.
    Raises KeyError for a weight that ``compiler.calibration.products`` finds no product with.
    """
    known, inside = products(graph), set(stage.nodes)
    nodes = {param: [node for node in known[param] if node in inside] for param in params}
    places, inputs = _distinct(nodes, "")
    sums = _sums(graph, stage, places, counts=counts, batches=batches, magnitudes=False)
    bundles = {name: own.bundle() for name, own in sums.items()}
    return {param: _moments(param, [bundles[name] for name in names], None) for param, names in inputs.items()}


def _moments(param: Param, bundles: Sequence[Mapping[str, Tensor]], gradient: Tensor | None) -> Moments:
    """The moments of ``param`` from those over parts of its products."""
    joined = bundles[0] if len(bundles) == 1 else _joined(bundles)
    magnitudes = joined.get("magnitude"), joined.get("largest")
    found = Moments(joined["count"], joined["mean"], joined["second"], gradient, *magnitudes)
    return found if _stacked(param) else found.of_expert(0)


def _joined(bundles: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Means over all vectors of several products from those over each's."""
    count = torch.stack([bundle["count"] for bundle in bundles]).sum(0)
    found = {"count": count}
    if "largest" in bundles[0]:
        found["largest"] = torch.stack([bundle["largest"] for bundle in bundles]).amax(0)
    for key in _MEANS & bundles[0].keys():
        found[key] = torch.zeros_like(bundles[0][key])
        for bundle in bundles:
            share = bundle["count"] / count.clamp_min(1)
            found[key] += bundle[key] * share.view(-1, *[1] * (bundle[key].ndim - 1))
    return found


def key_of(graph: Graph, nodes: Mapping[Param, object], batches: Batches, gradients: Batches, seed: int) -> str:
    """A name that changes with the model, the weights that are measured, and the data."""
    digest = hashlib.sha256(f"{seed} {len(batches)}".encode())
    for param in graph.params.values():
        digest.update(f"{param.name} {param.expr.key} {param in nodes}\n".encode())
    for batch in (*batches, *gradients):
        for name, tensor in batch.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


# --- what enters ---------------------------------------------------------------------------------------------


_MEANS = {"mean", "second", "magnitude"}


class Sums:
    """Sums over vectors, in float64, for each of a number of experts; with ``magnitudes`` of these, and the largest."""

    def __init__(self, experts: int, width: int, *, magnitudes: bool) -> None:
        self._magnitudes = magnitudes
        shapes = {"count": (), "mean": (width,), "second": (width, width)}
        if magnitudes:
            shapes |= {"magnitude": (width,), "largest": (width,)}
        self._found = {key: torch.zeros(experts, *shape, dtype=torch.float64) for key, shape in shapes.items()}
        self._waiting: list[list[Tensor]] = [[] for _ in range(experts)]

    def add(self, rows: Rows, counts: Tensor | None) -> None:
        for expert, given in rows:
            vectors = given.float()
            weighed = vectors if counts is None else vectors * counts[:, None]
            self._found["count"][expert] += len(vectors) if counts is None else counts.sum()
            self._found["mean"][expert] += weighed.sum(0)
            if self._magnitudes:
                self._found["magnitude"][expert] += weighed.abs().sum(0)
                largest = self._found["largest"][expert]
                torch.maximum(largest, vectors.abs().amax(0).double(), out=largest)
            waiting = self._waiting[expert]
            waiting.append(vectors if counts is None else vectors * counts.sqrt()[:, None])
            if sum(map(len, waiting)) >= max(ENOUGH, vectors.shape[1]):
                self._square(expert)

    def _square(self, expert: int) -> None:
        """Add the products of the vectors that wait."""
        for block in torch.cat(self._waiting[expert]).split(BLOCK) if self._waiting[expert] else ():
            self._found["second"][expert] += gram(block)
        self._waiting[expert].clear()

    def bundle(self) -> dict[str, Tensor]:
        """The sums as means, in their place: a stack's second moments are too large to have twice. Ends the sums."""
        for expert in range(len(self._waiting)):
            self._square(expert)
        for key in _MEANS & self._found.keys():
            own = self._found[key]
            own /= self._found["count"].clamp_min(1).view(-1, *[1] * (own.ndim - 1))
        return self._found


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
    *,
    counts: Sequence[Tensor] | None = None,
    batches: Container[int] | None = None,
    magnitudes: bool = True,
) -> dict[str, Sums]:
    if not places:
        return {}
    sums = {name: Sums(*_groups(param), magnitudes=magnitudes) for name, _, param in places}
    wanted = list(dict.fromkeys(value for _, node, _ in places for value in reads(node)))
    weights = expert_weights(graph, [node for _, node, _ in places])
    for batch, values in enumerate(stage.values(wanted)):
        if batches is not None and batch not in batches:
            continue
        with quick_products():
            for name, node, param in places:
                rows = entering(node, param, {**values, **weights})
                sums[name].add(rows, None if counts is None else counts[batch])
    return sums


def _groups(param: Param) -> tuple[int, int]:
    experts, _, columns = matrix_shape(param)
    return experts, columns


def _stacked(param: Param) -> bool:
    return any(node.op.name == "experts" for node in param.users)


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
