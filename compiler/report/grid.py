"""Pictures of places by layer: what remains of each, and what each loses with what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from compiler.ir.layers import layer_of

WIDTH, HEIGHT, GAP, LETTER, FOOT = 26, 24, 6, 6.2, 18

Document = Mapping[str, Any]


@dataclass(frozen=True)
class _Cell:
    """One place: what a reader is told, and what is drawn with its upper left corner at x and y."""

    title: str
    drawn: Callable[[float, float], str]


def kept_picture(rewritten: Iterable[Document]) -> str:
    """A bar for every place whose parameters were counted before and after: what remains. "" when there is none."""
    cells: dict[str, _Cell] = {}
    for place in rewritten:
        numbers = place["numbers"]
        if numbers.get("parameters_before") and "parameters_after" in numbers:
            part = numbers["parameters_after"] / numbers["parameters_before"]
            title = f"{place['scope']}: {place['what']}, {part:.0%} of its parameters"
            cells[place["scope"]] = _Cell(title, lambda x, y, part=part: _bars(x, y, part))
    return _grid(cells, "what remains of each place, by layer") if cells else ""


def curve_picture(curves: Iterable[Document]) -> str:
    """For every place a curve of what it loses by what it keeps, and a dot at what it got. "" when there is none."""
    cells: dict[str, _Cell] = {}
    for curve in curves:
        title = f"{curve['scope']}: keeps {curve['chosen']:.0%}"
        cells[curve["scope"]] = _Cell(title, lambda x, y, curve=curve: _curve(x, y, curve))
    return _grid(cells, "what each place loses by what it keeps") if cells else ""


def _grid(cells: Mapping[str, _Cell], label: str) -> str:
    rows: dict[str, dict[int, _Cell]] = {}
    for scope, cell in cells.items():
        row, column = _place(scope)
        rows.setdefault(row, {})[column] = cell
    columns = sorted({column for row in rows.values() for column in row})
    left = LETTER * max(map(len, rows)) + 8
    width, height = left + (WIDTH + GAP) * len(columns), (HEIGHT + GAP) * len(rows) + FOOT
    head = f'<svg viewBox="0 0 {width:g} {height}" width="{width:g}" height="{height}" role="img" aria-label="{label}">'
    return "\n".join([head, *_rows(rows, columns, left), *_numbers(columns, left, height), "</svg>"])


def _place(scope: str) -> tuple[str, int]:
    """The row of a place, its name with a star for the layer, and its column, the layer."""
    layer = layer_of(scope)
    if layer is None:
        return scope, 0
    return f"{layer.stack}.*{scope.removeprefix(layer.scope)}".lstrip("."), layer.index


def _rows(rows: Mapping[str, Mapping[int, _Cell]], columns: Sequence[int], left: float) -> Iterator[str]:
    for number, (name, row) in enumerate(rows.items()):
        y = number * (HEIGHT + GAP)
        yield f'<text x="{left - 8:g}" y="{y + HEIGHT - 6}" text-anchor="end">{escape(name)}</text>'
        for column, cell in row.items():
            x = left + columns.index(column) * (WIDTH + GAP)
            yield f"<g><title>{escape(cell.title)}</title>{cell.drawn(x, y)}</g>"


def _numbers(columns: Sequence[int], left: float, height: int) -> Iterator[str]:
    for number, column in enumerate(columns):
        x = left + number * (WIDTH + GAP) + WIDTH / 2
        yield f'<text x="{x:g}" y="{height - 4}" text-anchor="middle">{column}</text>'


def _bars(x: float, y: float, part: float) -> str:
    size = HEIGHT * min(part, 1.0)
    whole = f'<rect class="before" x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}"/>'
    return whole + f'<rect class="after" x="{x:g}" y="{y + HEIGHT - size:.1f}" width="{WIDTH}" height="{size:.1f}"/>'


def _curve(x: float, y: float, curve: Document) -> str:
    most = max(*curve["lost"], 0.0) or 1.0
    pairs = zip(curve["kept"], curve["lost"], strict=True)
    points = [(x + WIDTH * kept, y + HEIGHT * (1 - lost / most)) for kept, lost in pairs]
    dot = min(zip(curve["kept"], points, strict=True), key=lambda pair: abs(pair[0] - curve["chosen"]))[1]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    frame = f'<rect class="frame" x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}"/>'
    circle = f'<circle class="dot" cx="{dot[0]:.1f}" cy="{dot[1]:.1f}" r="2.2"/>'
    return f'{frame}<polyline class="line" points="{line}"/>{circle}'
