"""Which widths: as asked, or the split of the cache between rotary key and latent that calibration likes best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from compiler.calibration.fidelity import Fidelity, spread
from compiler.errors import PassError
from compiler.ir.graph import Graph, Node
from compiler.pipeline import Context
from passes.gqa_to_mla.latent import Layout, largest_rank
from passes.gqa_to_mla.measured import Measured
from passes.gqa_to_mla.ranks import by_layer
from passes.gqa_to_mla.rotary import keep_best
from passes.gqa_to_mla.source import Source
from passes.gqa_to_mla.trial import Trials

if TYPE_CHECKING:
    from passes.gqa_to_mla import GqaToMla

T = TypeVar("T")

CHOICE_TOKENS = 2048
PROBE_TOKENS = 512
SPLITS = (1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 1 / 2)  # the part of the cache that rotary keys may get


def choose(
    graph: Graph,
    ctx: Context,
    options: GqaToMla,
    sources: Sequence[Source],
    measured: Mapping[Node, Measured],
    batches: Sequence[Mapping[str, Tensor]],
) -> list[Layout]:
    """A layout for every source. Raises PassError when the widths asked for do not fit."""
    if options.cache is None:
        return _asked(options, sources, measured)
    if options.cache * min(source.cached for source in sources) < 1:
        raise PassError("that leaves no value a token", option="cache", remedy="write more, such as `cache: 50%`")
    splits = [_split(options.cache, part, sources, measured) for part in SPLITS]
    splits = list(dict.fromkeys(map(tuple, splits)))
    if ctx.planned:
        likely = list(splits[len(splits) // 2])
        return likely if options.ranks == "uniform" else _unlike(likely)
    trials, fidelity = Trials(graph, ctx, measured), Fidelity(graph, spread(batches, CHOICE_TOKENS, 1))
    found = descend(splits, lambda layouts: trials.distance(layouts, fidelity))
    if options.ranks == "by-layer":
        best = min(found, key=lambda layouts: found[layouts])
        varied = tuple(by_layer(trials, best, Fidelity(graph, spread(batches, PROBE_TOKENS, 2))))
        found.setdefault(varied, trials.distance(varied, fidelity))
    best = min(found, key=lambda layouts: found[layouts])
    for layouts, distance in found.items():
        ctx.tried(_described(layouts), distance, layouts == best)
    return list(best)


def _unlike(layouts: list[Layout]) -> list[Layout]:
    """Before anything is measured: which ranks layers get is not known, that they differ is."""
    first, *rest = layouts
    return [replace(first, rank=first.rank - 1), *rest] if first.rank > 1 else layouts


def _described(layouts: Sequence[Layout]) -> str:
    ranks = sorted({layout.rank for layout in layouts})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"rotary key of {layouts[0].rotary_dim}, latent of {rank}"


def descend(choices: Sequence[T], distance: Callable[[T], float]) -> dict[T, float]:
    """The distances of neighbours in the middle of ``choices``, and on from there downhill as far as it goes."""
    middle = len(choices) // 2
    found = {choice: distance(choice) for choice in choices[max(0, middle - 1) : middle + 1]}
    upwards = len(found) == 1 or found[choices[middle]] <= found[choices[middle - 1]]
    ahead = choices[middle + 1 :] if upwards else choices[: max(0, middle - 1)][::-1]
    for choice in ahead:
        best = min(found.values())
        found[choice] = distance(choice)
        if found[choice] > best:
            break
    return found


def _asked(options: GqaToMla, sources: Sequence[Source], measured: Mapping[Node, Measured]) -> list[Layout]:
    most = max(2 * source.pairs * source.groups for source in sources)
    width = most if options.rope_dim == "full" else int(options.rope_dim)
    if width % 2 or width > most:
        raise PassError(
            f"rope-dim {width} is no even number up to {most}, the rotary numbers of a token's keys",
            option="rope_dim",
            remedy="write `rope-dim: full`, or half of that",
        )
    return [
        _layout(source, kept, options.rank)
        for source, kept in zip(sources, _kept(width, sources, measured), strict=True)
    ]


def _layout(source: Source, kept: tuple[int, ...], rank: int | str) -> Layout:
    largest = largest_rank(source, kept)
    if rank == "full":
        return Layout(largest, kept)
    if not 1 <= int(rank) <= largest:
        raise PassError(
            f"rank {rank} is not from 1 to {largest}, which loses nothing beside a rotary key of {2 * sum(kept)}",
            option="rank",
            remedy="write `rank: full`, or less",
        )
    return Layout(int(rank), kept)


def _split(cache: float, part: float, sources: Sequence[Source], measured: Mapping[Node, Measured]) -> list[Layout]:
    """The layouts in which rotary keys get ``part`` of what remains of the cache."""
    widths = [int(cache * source.cached) for source in sources]
    rotary = min(2 * round(width * part / 2) for width in widths)
    kept = _kept(rotary, sources, measured)
    pairs = zip(sources, widths, kept, strict=True)
    return [_layout(source, own, min(width - 2 * sum(own), largest_rank(source, own))) for source, width, own in pairs]


def _kept(width: int, sources: Sequence[Source], measured: Mapping[Node, Measured]) -> list[tuple[int, ...]]:
    """How many components of each pair stay; the same for all alike that share a rotary table."""
    tables: dict[tuple[Node | None, int], list[Source]] = {}
    for source in sources:
        tables.setdefault((source.table, source.groups), []).append(source)
    counts: dict[tuple[Node | None, int], tuple[int, ...]] = {}
    for key, sharing in tables.items():
        pairs, groups = sharing[0].pairs, sharing[0].groups
        count = min(width // 2, pairs * groups)
        losses = [measured[source.site.node].loss for source in sharing] if measured else None
        counts[key] = tuple(keep_best(losses, count)) if losses else _evenly(count, pairs)
    return [counts[source.table, source.groups] for source in sources]


def _evenly(count: int, pairs: int) -> tuple[int, ...]:
    """Without measurements: the fastest pairs first, each as often as it takes."""
    return tuple(count // pairs + (pair < count % pairs) for pair in range(pairs)) if pairs else ()
