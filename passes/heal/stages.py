"""The stages of healing, each undone unless it brings the model nearer to the original on windows held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from compiler.calibration.distil.job import Job, key_of
from compiler.calibration.distil.whole import distil
from compiler.calibration.distil.windows import divide
from compiler.calibration.fidelity import Fidelity
from compiler.errors import PassError
from compiler.ir.graph import Graph, Param
from compiler.pipeline import Context
from passes.heal.layers import heal_layers

if TYPE_CHECKING:
    from passes.heal import Heal


def heal(
    options: Heal, graph: Graph, ctx: Context, params: Sequence[Param], batches: Sequence[Mapping[str, Tensor]]
) -> None:
    """Heal ``params`` of ``graph`` as ``options`` say. Raises PassError when ``batches`` are too few."""
    windows = divide(batches)
    means = options.of == "means"
    if means and next(iter(graph.outputs)) == "logits":
        cause = "the model gives logits, whose means over tokens nobody reads"
        raise PassError(cause, option="of", remedy="leave it out")
    fidelity = Fidelity(ctx.original, windows.held, means=means)
    best = fidelity.distance(graph)
    ctx.tried("as it came", best, False)

    def judged(what: str, rate: float, stage: Callable[[Job], None]) -> None:
        nonlocal best
        before = [param.expr for param in params]
        key = key_of(params, what, options)
        stage(Job(graph, ctx.original, ctx, params, windows, rate, options.seed, key, means))
        distance = fidelity.distance(graph)
        ctx.tried(what, distance, distance < best)
        if distance >= best:
            for param, expr in zip(params, before, strict=True):
                param.expr = expr
            ctx.skipped(
                "", f"{what}: undone, as held-out windows were {best:.4g} from the original and then {distance:.4g}"
            )
        best = min(best, distance)

    if options.layer_tokens:
        judged("healed layer by layer", options.layer_rate, lambda job: heal_layers(job, options.layer_tokens))
    if options.tokens:
        judged("healed end to end", options.rate, lambda job: _end_to_end(job, options))


def _end_to_end(job: Job, options: Heal) -> None:
    exprs, seen = distil(job, options.adapters, options.tokens)
    for param, expr in exprs.items():
        param.expr = expr
    what = f"{len(exprs)} weights distilled through adapters of rank {options.adapters}"
    job.ctx.rewrote("", what, tokens=seen)
