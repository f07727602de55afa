"""How far a rewritten graph has moved from the original on calibration data: what choices between rewrites go by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from compiler.calibration.sweep import sweep
from compiler.ir.graph import Graph

POSITIONS = 128  # of each sample, evenly spaced: distributions over a vocabulary are large


class Fidelity:
    """The original's outputs on ``batches`` (inputs by name), and the distance of other graphs from them.

    With ``means``, of outputs that are no logits, means over all tokens are compared.
    """

    def __init__(self, graph: Graph, batches: Sequence[Mapping[str, Tensor]], *, means: bool = False) -> None:
        self._batches = batches
        self._means = means
        self._reference = list(_outputs(graph, batches, means))

    def distance(self, graph: Graph) -> float:
        """Of logits the mean KL divergence in nats, of other outputs the mean square error relative to their energy."""
        pairs = zip(self._reference, _outputs(graph, self._batches, self._means), strict=True)
        over, under = (sum(part) for part in zip(*(_distance(*pair) for pair in pairs), strict=True))
        return over / under


def _distance(reference: tuple[bool, Tensor], found: tuple[bool, Tensor]) -> tuple[float, float]:
    logits, expected = reference
    if not logits:
        return float((expected - found[1]).square().sum()), float(expected.square().sum())
    wanted, got = expected.log_softmax(-1), found[1].log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum()), float(wanted[..., 0].numel())


def _outputs(
    graph: Graph, batches: Sequence[Mapping[str, Tensor]], means: bool = False
) -> Iterator[tuple[bool, Tensor]]:
    """Per batch, whether the output is logits, and its values [.., positions, width] in float32, or their means."""
    name, value = next(iter(graph.outputs.items()))
    for stage in sweep(graph, batches, exact=True):
        if value.node in stage.nodes:
            for values in stage.values([value]):
                output = values[value].float()
                yield name == "logits", of_samples(output) if means and name != "logits" else _thinned(output)
            return


def of_samples(output: Tensor) -> Tensor:
    """The mean [B, width] over the tokens of [B, T, width]; other outputs as they are."""
    return output.mean(1) if output.ndim == 3 else output


def _thinned(output: Tensor) -> Tensor:
    """At most ``POSITIONS`` positions of [B, T, width]; other outputs as they are."""
    if output.ndim != 3:
        return output
    step = max(1, output.shape[1] // POSITIONS)
    return output[:, step - 1 :: step].clone()


def positions(batch: Mapping[str, Tensor]) -> int:
    """Samples times positions of what a model reads or, with a decoder, writes; of a picture samples times channels."""
    ids = [tensor for tensor in batch.values() if not tensor.is_floating_point()]
    return max(tensor.shape[:2].numel() for tensor in ids or batch.values())


def spread(batches: Sequence[Mapping[str, Tensor]], tokens: int, offset: int = 0) -> list[Mapping[str, Tensor]]:
    """Evenly spaced batches, from ``offset``, that have about ``tokens`` tokens, and at least one."""
    total = sum(map(positions, batches))
    step = max(1, round(total / tokens))
    return list(batches[min(offset, step - 1) :: step])
