"""What outputs cost against what they are worth, as one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from compiler.compare import COSTS, Comparison, Output, comparison_rows, sentences, spelt_cost
from compiler.report.page import drawn, render
from compiler.report.quality import higher_is_better, metric_title, spelt_estimate

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 72, 96, 16, 48
MARGIN = 0.08  # of each axis, so that nothing lies on an edge
LETTER = 6.4


def pareto_page(found: Comparison) -> str:
    """The page: the picture, the table, and what is noise."""
    header, *rows = comparison_rows(found)
    better = "higher" if higher_is_better(found.quality) else "lower"
    return render(
        "pareto.html.jinja",
        title=f"{len(found.outputs)} outputs compared",
        subtitle=f"{metric_title(found.quality)} ({better} is better) against {COSTS[found.cost]}",
        picture=drawn(pareto_picture(found)),
        header=header,
        rows=rows,
        sentences=sentences(found),
    )


def pareto_picture(found: Comparison) -> str:
    """A point with its interval for each output, and a line through those that none beats in both."""
    across = _Axis([output.costs[found.cost] for output in found.outputs], LEFT, WIDTH - RIGHT)
    estimates = [output.evaluation["metrics"][found.quality] for output in found.outputs]
    ends = [each[key] for each in estimates for key in ("low", "high", "value")]
    up = _Axis(ends, HEIGHT - BOTTOM, TOP)
    head = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        'aria-label="quality against cost">'
    )
    best = set(found.best())
    front = sorted(
        (across(output.costs[found.cost]), up(found.value(output))) for output in found.outputs if output.name in best
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
    points = [part for output in found.outputs for part in _point(found, output, across, up, output.name in best)]
    labels = [*_ticks(across, up, found), f'<polyline class="line" points="{line}"/>', *points]
    return "\n".join([head, *labels, "</svg>"])


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


def _ticks(across: _Axis, up: _Axis, found: Comparison) -> Iterator[str]:
    floor = HEIGHT - BOTTOM
    for value in up.ticks():
        y = up(value)
        yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="var(--line)"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
    for value in across.ticks():
        text = escape(spelt_cost(found.cost, value))
        yield f'<text x="{across(value):.1f}" y="{floor + 18}" text-anchor="middle">{text}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text x="{middle:g}" y="{HEIGHT - 8}" text-anchor="middle">{COSTS[found.cost]}</text>'


def _point(found: Comparison, output: Output, across: _Axis, up: _Axis, best: bool) -> Iterator[str]:
    each = output.evaluation["metrics"][found.quality]
    x, y = across(output.costs[found.cost]), up(each["value"])
    kind = "after" if best else "before"
    yield f"<g><title>{escape(output.name)}: {escape(spelt_estimate(each))}</title>"
    yield f'<line x1="{x:.1f}" y1="{up(each["low"]):.1f}" x2="{x:.1f}" y2="{up(each["high"]):.1f}" class="whisker"/>'
    yield f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    inside = x + 9 + LETTER * len(output.name) < WIDTH
    place, anchor = (x + 9, "start") if inside else (x - 9, "end")
    yield f'<text x="{place:.1f}" y="{y - 7:.1f}" text-anchor="{anchor}">{escape(output.name)}</text></g>'
