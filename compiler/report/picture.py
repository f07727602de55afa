"""A picture of stored bytes by layer, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

from compiler.console import human_bytes

HEIGHT, LEFT, TOP, BOTTOM = 180, 64, 10, 28
SLOT = 18


def layer_picture(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """A bar a layer: what it took before, and in front of it what it takes now. The rest of the model comes first."""
    scopes = list(dict.fromkeys([*before, *after]))
    most = max([*before.values(), *after.values(), 1])
    width = LEFT + SLOT * len(scopes) + 8
    bars = [
        bar
        for index, scope in enumerate(scopes)
        for bar in _bars(index, scope, before.get(scope, 0), after.get(scope, 0), most)
    ]
    total = TOP + HEIGHT + BOTTOM
    head = (
        f'<svg viewBox="0 0 {width} {total}" width="{width}" height="{total}" role="img" aria-label="bytes by layer">'
    )
    return "\n".join([head, *_axis(most, width), *bars, "</svg>"])


def _bars(index: int, scope: str, before: int, after: int, most: int) -> Iterator[str]:
    x = LEFT + index * SLOT
    name = scope or "outside of layers"
    yield f"<g><title>{escape(name)}: {human_bytes(before)} before, {human_bytes(after)} after</title>"
    yield _bar("before", x, SLOT - 4, before, most)
    yield _bar("after", x + 3, SLOT - 10, after, most)
    yield "</g>"
    label = scope.rsplit(".", 1)[-1] if scope else "rest"
    if label == "rest" or not label.isdigit() or int(label) % 4 == 0:
        yield f'<text x="{x + (SLOT - 4) / 2:g}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{escape(label)}</text>'


def _bar(kind: str, x: float, width: float, count: int, most: int) -> str:
    height = HEIGHT * count / most
    return f'<rect class="{kind}" x="{x:g}" y="{TOP + HEIGHT - height:.1f}" width="{width}" height="{height:.1f}"/>'


def _axis(most: int, width: int) -> Iterator[str]:
    for part in (0.0, 0.5, 1.0):
        y = TOP + HEIGHT * (1 - part)
        yield f'<line x1="{LEFT - 4}" y1="{y:g}" x2="{width}" y2="{y:g}" stroke="var(--line)"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:g}" text-anchor="end">{human_bytes(most * part)}</text>'
