"""What outputs cost against what they are worth, as one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from compiler.compare import COSTS, Comparison, Output, comparison_rows, sentences, spelt_cost
from compiler.report.page import drawn, render
from compiler.report.quality import higher_is_better, metric_title, spelt_estimate

BROAD, NARROW = 720, 330
"""Widths of the picture, in pixels: of a page on a desk, and of a page on a telephone of 360."""
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 72, 24, 16, 48
MARGIN = 0.08  # of each axis, so that nothing lies on an edge
LETTER, LINE, GAP = 6.4, 14, 9  # of names: the width of a letter, the height of a line, the distance from the point


def pareto_page(found: Comparison) -> str:
    """The page: the picture, the table, and what is noise."""
    header, *rows = comparison_rows(found)
    better = "higher" if higher_is_better(found.quality) else "lower"
    return render(
        "pareto.html.jinja",
        title=f"{len(found.outputs)} outputs compared",
        subtitle=f"{metric_title(found.quality)} ({better} is better) against {COSTS[found.cost]}",
        broad=drawn(pareto_picture(found, BROAD)),
        narrow=drawn(pareto_picture(found, NARROW)),
        header=header,
        rows=rows,
        sentences=sentences(found),
    )


def pareto_picture(found: Comparison, width: int) -> str:
    """A point with its interval for each output, and a line through those that none beats in both.

    ``width`` is in pixels.
    """
    across = _Axis([output.costs[found.cost] for output in found.outputs], LEFT, width - RIGHT)
    estimates = [output.evaluation["metrics"][found.quality] for output in found.outputs]
    ends = [each[key] for each in estimates for key in ("low", "high", "value")]
    up = _Axis(ends, HEIGHT - BOTTOM, TOP)
    head = (
        f'<svg viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" role="img" '
        'aria-label="quality against cost">'
    )
    best = set(found.best())
    front = sorted(
        (across(output.costs[found.cost]), up(found.value(output))) for output in found.outputs if output.name in best
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
    places = [(across(output.costs[found.cost]), up(found.value(output))) for output in found.outputs]
    points = [part for output in found.outputs for part in _point(found, output, across, up, output.name in best)]
    names = [*_names([output.name for output in found.outputs], places, width)]
    under = [*_ticks(across, up, found), f'<polyline class="line" points="{line}"/>']
    return "\n".join([head, *under, *points, *names, "</svg>"])


class _Axis:
    """Numbers to places between ``start`` and ``end``, with a margin on both sides."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        spread = (high - low) or abs(high) or 1.0
        self.low, self.high = low - MARGIN * spread, high + MARGIN * spread
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        return [self.low + (self.high - self.low) * part for part in (0.05, 0.35, 0.65, 0.95)]


def _names(names: Sequence[str], places: Sequence[tuple[float, float]], width: int) -> Iterator[str]:
    """Each name beside its point: within a picture of ``width``, and on no other name if there is a way."""
    taken: list[tuple[float, float, float]] = []
    most = int((width - LEFT) / LETTER)
    for whole, (x, y) in zip(names, places, strict=True):
        name = whole if len(whole) <= most else f"{whole[: most - 1]}…"
        length = LETTER * len(name)
        lines = [y + down for down in (-7, LINE, -7 - LINE, 2 * LINE)]
        sides = [left for left in (x + GAP, x - GAP - length) if LEFT <= left <= width - length]
        sides = sides or [min(max(LEFT, x - length / 2), width - length)]
        ways = [(left, line, length) for line in lines for left in sides]
        way = next((way for way in ways if not any(_overlap(way, other) for other in taken)), ways[0])
        taken.append(way)
        yield f'<text class="name" x="{way[0]:.1f}" y="{way[1]:.1f}">{escape(name)}</text>'


def _overlap(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    """Whether two names, each by its left end, its line and its length, lie on each other."""
    return abs(one[1] - other[1]) < LINE and one[0] < other[0] + other[2] and other[0] < one[0] + one[2]


def _ticks(across: _Axis, up: _Axis, found: Comparison) -> Iterator[str]:
    floor = HEIGHT - BOTTOM
    for value in up.ticks():
        y = up(value)
        yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{across.end}" y2="{y:.1f}" stroke="var(--line)"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
    for value in across.ticks():
        text = escape(spelt_cost(found.cost, value))
        yield f'<text x="{across(value):.1f}" y="{floor + 18}" text-anchor="middle">{text}</text>'
    middle = (across.start + across.end) / 2
    yield f'<text x="{middle:g}" y="{HEIGHT - 8}" text-anchor="middle">{COSTS[found.cost]}</text>'


def _point(found: Comparison, output: Output, across: _Axis, up: _Axis, best: bool) -> Iterator[str]:
    each = output.evaluation["metrics"][found.quality]
    x, y = across(output.costs[found.cost]), up(each["value"])
    kind = "after" if best else "before"
    yield f"<g><title>{escape(output.name)}: {escape(spelt_estimate(each))}</title>"
    yield f'<line x1="{x:.1f}" y1="{up(each["low"]):.1f}" x2="{x:.1f}" y2="{up(each["high"]):.1f}" class="whisker"/>'
    yield f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/></g>'
