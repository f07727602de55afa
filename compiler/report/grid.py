"""Pictures of places by layer: what remains of each, what it loses or errs by, and what matrices take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from compiler.console import human_bytes
from compiler.ir.layers import layer_of

WIDTH, HEIGHT, GAP, LETTER, FOOT = 18, 24, 5, 6.4, 18

Document = Mapping[str, Any]


@dataclass(frozen=True)
class _Cell:
    """One place: what a reader is told, and what is drawn with its upper left corner at x and y."""

    title: str
    drawn: Callable[[float, float], str]


def kept_picture(rewritten: Iterable[Document]) -> str:
    """A bar for every place whose parameters or tokens were counted before and after: what remains. "" without any."""
    cells: dict[str, _Cell] = {}
    for place in rewritten:
        found = _kept(place["numbers"])
        if found is not None:
            part, of = found
            title = f"{place['scope']}: {place['what']}, {part:.0%} of its {of}"
            cells[place["scope"]] = _Cell(title, lambda x, y, part=part: _bars(x, y, part))
    return _grid(cells, "what remains of each place, by layer") if cells else ""


def _kept(numbers: Document) -> tuple[float, str] | None:
    """The part that remains, and of what; None where that was not counted."""
    if numbers.get("parameters_before") and "parameters_after" in numbers:
        return numbers["parameters_after"] / numbers["parameters_before"], "parameters"
    if numbers.get("before") and "after" in numbers:
        return numbers["after"] / numbers["before"], "tokens"
    return None


def error_picture(rewritten: Sequence[Document]) -> str:
    """A bar for every error that a pass left behind, by place and layer, each row to a scale of its own. "" without."""
    found = {
        (f"{place['scope']}.{name}" if len(_errors(place)) > 1 else place["scope"]): (place["scope"], name, value)
        for place in rewritten
        for name, value in _errors(place).items()
    }
    most: dict[str, float] = {}
    for scope, (_, _, value) in found.items():
        most[_place(scope)[0]] = max(most.get(_place(scope)[0], 0.0), value)
    cells = dict[str, _Cell]()
    for scope, (place, name, value) in found.items():
        part = value / (most[_place(scope)[0]] or 1.0)
        title = f"{place}: {name.replace('_', ' ')} {value:.3g}"
        cells[scope] = _Cell(title, lambda x, y, part=part: _bars(x, y, part, "error"))
    aside = {row: f"to {value:.2g}" for row, value in most.items()}
    return _grid(cells, "errors by layer", aside) if any(most.values()) else ""


def _errors(place: Document) -> dict[str, float]:
    """The errors among the numbers of a place, and what it was predicted to lose; those of before are none."""
    numbers = place["numbers"].items()
    return {
        name: float(value)
        for name, value in numbers
        if ("error" in name or "loss" in name) and not name.endswith("before")
    }


def matrix_picture(before: Sequence[Document], after: Sequence[Document]) -> str:
    """Every matrix of the layers: an outline of the bytes that it took, filled to what it takes now, by bits a weight.

    Each row is to a scale of its own, a row of parts to that of the matrix that they stand for, under which they are,
    one of other new matrices to that of the largest beside it; at its end is what the row takes in all. "" when no
    matrix lies in a layer.
    """
    old, new = ({matrix["name"]: matrix for matrix in each} for each in (before, after))
    names = [name for name in _by_origin(old, new) if inside_layer(name)]
    most, totals = dict[str, int](), dict[str, list[int]]()
    for name in names:
        row = _place(_short(name))[0]
        sizes = [each[name]["stored_bytes"] if name in each else 0 for each in (old, new)]
        most[row] = max(most.get(row, 0), sizes[0])
        totals[row] = [a + b for a, b in zip(totals.get(row, [0, 0]), sizes, strict=True)]
    beside = {row: max(size for other, size in most.items() if _module(other) == _module(row)) for row in most}
    largest = max([*most.values(), 1])
    most = {row: size or most.get(_module(row)) or beside[row] or largest for row, size in most.items()}
    cells = {
        _short(name): _Cell(
            f"{_short(name)}: {_told(old.get(name))}, then {_told(new.get(name))}",
            lambda x, y, name=name: _filled(x, y, old.get(name), new.get(name), most[_place(_short(name))[0]]),
        )
        for name in names
    }
    aside = {row: f"{human_bytes(one)} → {human_bytes(other)}" for row, (one, other) in totals.items()}
    return _grid(cells, "every matrix before and after, by layer", aside) if cells else ""


def _by_origin(old: Iterable[str], new: Iterable[str]) -> list[str]:
    """All names by their rows, those of parts behind that of the matrix that they stand for."""
    rows = list(dict.fromkeys(_place(_short(name))[0] for name in old))
    place = {row: index for index, row in enumerate(rows)}

    def position(name: str) -> int:
        row = _place(_short(name))[0]
        return place.get(row, place.get(_module(row), len(place)))

    return sorted(dict.fromkeys([*old, *new]), key=position)


def inside_layer(name: str) -> bool:
    """Whether a weight of this name lies in a layer; a numbered weight is no layer of its own."""
    layer = layer_of(name)
    return layer is not None and layer.scope != name


def bits_of(matrix: Document) -> float:
    """Stored bits for each element of a matrix, scales included."""
    return 8 * matrix["stored_bytes"] / max(1, math.prod(matrix["shape"]))


def bits_class(bits: float) -> str:
    """The colour of a number of bits: that of the smallest of 2, 4, 8, 16 and 32 that it does not much exceed."""
    return next((f"bits{limit}" for limit in (2, 4, 8, 16) if bits <= 1.45 * limit), "bits32")


def _module(row: str) -> str:
    return row.rpartition(".")[0]


def _short(name: str) -> str:
    return name.removesuffix(".weight")


def _told(matrix: Document | None) -> str:
    if matrix is None:
        return "nothing"
    shape = " x ".join(map(str, matrix["shape"]))
    return f"{shape}, {human_bytes(matrix['stored_bytes'])} at {bits_of(matrix):.3g} bits"


def _filled(x: float, y: float, old: Document | None, new: Document | None, most: int) -> str:
    def bar(kind: str, matrix: Document | None) -> str:
        size = HEIGHT * min(1.0, (matrix["stored_bytes"] if matrix else 0) / most)
        return f'<rect class="{kind}" x="{x:g}" y="{y + HEIGHT - size:.1f}" width="{WIDTH}" height="{size:.1f}"/>'

    return bar("outline", old) + (bar(bits_class(bits_of(new)), new) if new else "")


def curve_picture(curves: Iterable[Document]) -> str:
    """For every place a curve of what it loses by what it keeps, and a dot at what it got. "" when there is none."""
    cells: dict[str, _Cell] = {}
    for curve in curves:
        title = f"{curve['scope']}: keeps {curve['chosen']:.0%}"
        cells[curve["scope"]] = _Cell(title, lambda x, y, curve=curve: _curve(x, y, curve))
    return _grid(cells, "what each place loses by what it keeps") if cells else ""


def _grid(cells: Mapping[str, _Cell], label: str, aside: Mapping[str, str] | None = None) -> str:
    rows, aside = dict[str, dict[int, _Cell]](), aside or {}
    for scope, cell in cells.items():
        row, column = _place(scope)
        rows.setdefault(row, {})[column] = cell
    stack = _common_stack(rows)
    columns = sorted({column for row in rows.values() for column in row})
    left = LETTER * (max(map(len, rows)) - len(stack)) + 8
    middle = left + (WIDTH + GAP) * len(columns)
    width = middle + LETTER * max(map(len, aside.values()), default=0) + (8 if aside else 0)
    height = (HEIGHT + GAP) * len(rows) + FOOT
    head = f'<svg viewBox="0 0 {width:g} {height}" width="{width:g}" height="{height}" role="img" aria-label="{label}">'
    beside = [
        f'<text x="{middle + 4:g}" y="{number * (HEIGHT + GAP) + HEIGHT - 6}">{escape(aside.get(name, ""))}</text>'
        for number, name in enumerate(rows if aside else ())
    ]
    return "\n".join([head, *_rows(rows, columns, left, stack), *beside, *_numbers(columns, left, height), "</svg>"])


def _place(scope: str) -> tuple[str, int]:
    """The row of a place, its name with a star for the layer, and its column, the layer."""
    layer = layer_of(scope)
    if layer is None:
        return scope, 0
    return f"{layer.stack}.*{scope.removeprefix(layer.scope)}".lstrip("."), layer.index


def _common_stack(rows: Iterable[str]) -> str:
    """The stack of layers, ``model.layers.*.``, that all rows are in; "" where there are several."""
    stacks = {name[: name.find("*.") + 2] if "*." in name else "" for name in rows}
    return stacks.pop() if len(stacks) == 1 else ""


def _rows(rows: Mapping[str, Mapping[int, _Cell]], columns: Sequence[int], left: float, stack: str) -> Iterator[str]:
    for number, (name, row) in enumerate(rows.items()):
        y = number * (HEIGHT + GAP)
        yield f'<text x="{left - 8:g}" y="{y + HEIGHT - 6}" text-anchor="end">{escape(name.removeprefix(stack))}</text>'
        for column, cell in row.items():
            x = left + columns.index(column) * (WIDTH + GAP)
            yield f"<g><title>{escape(cell.title)}</title>{cell.drawn(x, y)}</g>"


def _numbers(columns: Sequence[int], left: float, height: int) -> Iterator[str]:
    for number, column in enumerate(columns):
        x = left + number * (WIDTH + GAP) + WIDTH / 2
        yield f'<text x="{x:g}" y="{height - 4}" text-anchor="middle">{column}</text>'


def _bars(x: float, y: float, part: float, kind: str = "after") -> str:
    size = HEIGHT * min(part, 1.0)
    whole = f'<rect class="before" x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}"/>'
    return whole + f'<rect class="{kind}" x="{x:g}" y="{y + HEIGHT - size:.1f}" width="{WIDTH}" height="{size:.1f}"/>'


def _curve(x: float, y: float, curve: Document) -> str:
    most = max(*curve["lost"], 0.0) or 1.0
    pairs = zip(curve["kept"], curve["lost"], strict=True)
    points = [(x + WIDTH * kept, y + HEIGHT * (1 - lost / most)) for kept, lost in pairs]
    dot = min(zip(curve["kept"], points, strict=True), key=lambda pair: abs(pair[0] - curve["chosen"]))[1]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    frame = f'<rect class="frame" x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}"/>'
    circle = f'<circle class="dot" cx="{dot[0]:.1f}" cy="{dot[1]:.1f}" r="2.2"/>'
    return f'{frame}<polyline class="line" points="{line}"/>{circle}'
