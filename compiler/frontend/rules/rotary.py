"""Rotary position embedding from its arithmetic, in the three layouts in use, and its cosine and sine tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

from compiler.ir.graph import Node, Value
from compiler.ir.types import dim_product
from compiler.rewrite.site import Rule, Site, last_axis_slice, made_by, orders, scalar_of


@dataclass(frozen=True)
class Factor:
    """``scale * function(angles)``, each element standing for one pair.

    ``spread`` says how the last axis repeats the pairs: "" once, "half" all pairs twice, "interleaved" each pair
    twice in a row.
    """

    function: str
    angles: Value
    scale: float = 1.0
    spread: str = ""


def factor_of(value: Value) -> Factor | None:
    """Read ``value`` as a cosine or sine table, following it back to its angles."""
    node = value.node
    if node is None:
        return None
    match node.op.name:
        case "cos" | "sin":
            return _angles(node)
        case "mul":
            return _scaled(node)
        case "concat":
            return _repeated(node)
        case "slice":
            return _first_half(value)
        case "reshape":
            return _reshaped(node)
        case _:
            return None


def _angles(node: Node) -> Factor | None:
    spread, angles = _unspread(node.input(0))
    return Factor(node.op.name, angles, spread=spread)


def _unspread(value: Value) -> tuple[str, Value]:
    """How a value repeats pairs along its last axis, and the pairs."""
    joined = made_by(value, "concat")
    if joined is not None and _twice_the_same(joined):
        return "half", joined.input(0)
    flat = made_by(value, "reshape")
    wide = None if flat is None else made_by(flat.input(0), "expand")
    column = None if wide is None else made_by(wide.input(0), "reshape")
    if wide is None or column is None:
        return "", value
    pairs = column.input(0)
    doubled = wide.output.shape == (*pairs.shape, 2) and column.output.shape == (*pairs.shape, 1)
    return ("interleaved", pairs) if doubled else ("", value)


def _twice_the_same(joined: Node) -> bool:
    same = len(joined.inputs) == 2 and joined.input(0) is joined.input(1)
    return same and joined.attr("axis") == joined.output.type.rank - 1


def _scaled(node: Node) -> Factor | None:
    scalar = scalar_of(node)
    factor = None if scalar is None else factor_of(node.input(0))
    return None if factor is None or scalar is None else replace(factor, scale=factor.scale * scalar)


def _repeated(node: Node) -> Factor | None:
    factor = factor_of(node.input(0)) if _twice_the_same(node) else None
    return None if factor is None or factor.spread else replace(factor, spread="half")


def _first_half(value: Value) -> Factor | None:
    taken = last_axis_slice(value)
    if taken is None:
        return None
    x, start, stop, step = taken
    factor = factor_of(x)
    if factor is None or (start, step) != (0, 1) or factor.spread != "half" or stop != factor.angles.shape[-1]:
        return None
    return replace(factor, spread="")


def _reshaped(node: Node) -> Factor | None:
    """Axes of size 1 come and go; the interleaved spread may also be made here."""
    x, out = node.input(0), node.output
    if _without_ones(x) == _without_ones(out):
        return factor_of(x)
    spread, pairs = _unspread(out)
    factor = factor_of(pairs) if spread == "interleaved" else None
    return None if factor is None or factor.spread else replace(factor, spread=spread)


def _without_ones(value: Value) -> list[int | str]:
    return [dim for dim in value.shape if dim != 1]


# --- the rotation --------------------------------------------------------------------------------------------


def rotated_by_swapping(site: Site) -> Value | None:
    """x * cos + swap(x) * sin, where swap turns each pair (a, b) into (-b, a)."""
    for left, right in orders(site.node):
        first, second = made_by(left, "mul"), made_by(right, "mul")
        if first is None or second is None:
            continue
        for x, cos in orders(first):
            for swapped, sin in orders(second):
                found = _swap(swapped)
                tables = _tables(cos, sin) if found is not None and found[0] is x else None
                if found is not None and tables is not None and tables[0].spread == found[1]:
                    return _rope(site, x, tables[0], found[1], cos)
    return None


def _swap(value: Value) -> tuple[Value, str] | None:
    """(x, layout) when ``value`` is x with every pair (a, b) turned into (-b, a)."""
    parts = _two_parts(value)
    negated = None if parts is None else made_by(parts[0], "neg")
    if parts is None or negated is None:
        return None
    pair = _pair(parts[1], negated.input(0))
    if pair is None or (pair[1] == "interleaved") != parts[2] or pair[0].shape != value.shape:
        return None
    return pair


def _two_parts(value: Value) -> tuple[Value, Value, bool] | None:
    """The two values that ``value`` joins along its last axis, and whether element by element.

    Leading axes may be arranged in another way than in the parts.
    """
    flat = made_by(value, "reshape")
    joined = made_by(value if flat is None else flat.input(0), "concat")
    if joined is None or len(joined.inputs) != 2 or joined.attr("axis") != joined.output.type.rank - 1:
        return None
    if flat is None:
        return joined.input(0), joined.input(1), False
    first, second = (_column(part) for part in joined.inputs)
    if first is None or second is None or dim_product((2, first.shape[-1])) != value.shape[-1]:
        return None
    return first, second, True


def _column(value: Value | None) -> Value | None:
    """What is given a last axis of size 1 here."""
    node = made_by(value, "reshape")
    return None if node is None or node.output.shape != (*node.input(0).shape, 1) else node.input(0)


def _pair(first: Value, second: Value) -> tuple[Value, str] | None:
    """(x, layout) when the two values are the first and the second elements of all pairs of x."""
    one, two = last_axis_slice(first), last_axis_slice(second)
    if one is None or two is None or one[0] is not two[0]:
        return None
    x, width = one[0], one[0].shape[-1]
    if not isinstance(width, int) or width % 2:
        return None
    if (one[1:], two[1:]) == ((0, width // 2, 1), (width // 2, width, 1)):
        return x, "half"
    if (one[1], one[3], two[1], two[3]) == (0, 2, 1, 2) and one[2] >= width - 1 and two[2] == width:
        return x, "interleaved"
    return None


def rotated_by_parts(site: Site) -> Value | None:
    """(a cos - b sin, b cos + a sin), joined again as halves or as neighbours."""
    parts = _two_parts(site.node.output)
    if parts is None:
        return None
    real, imaginary = made_by(parts[0], "sub"), made_by(parts[1], "add")
    if real is None or imaginary is None or len(real.inputs) != 2 or len(imaginary.inputs) != 2:
        return None
    a_cos, b_sin = made_by(real.input(0), "mul"), made_by(real.input(1), "mul")
    if a_cos is None or b_sin is None:
        return None
    for a, cos in orders(a_cos):
        for b, sin in orders(b_sin):
            pair, tables = _pair(a, b), _tables(cos, sin)
            if pair is None or tables is None or tables[0].spread or not _is_imaginary(imaginary, a, b, cos, sin):
                continue
            rope = _joined(site, pair, tables[0], parts[2], cos)
            same = rope is None or rope.shape == site.node.output.shape
            return rope if same else site.op("reshape", rope, shape=site.node.output.shape)
    return None


def _joined(site: Site, pair: tuple[Value, str], cos: Factor, neighbours: bool, table: Value) -> Value | None:
    x, layout = pair
    if layout == "half":
        return None if neighbours else _rope(site, x, cos, "half", table)
    return _rope(site, x, cos, "interleaved" if neighbours else "interleaved-to-half", table)


def _is_imaginary(node: Node, a: Value, b: Value, cos: Value, sin: Value) -> bool:
    """Whether ``node`` is b cos + a sin, in any order, with the same tables."""
    terms = [{id(v) for v in term.inputs} for term in (made_by(v, "mul") for v in node.inputs) if term is not None]
    return sorted(map(sorted, terms)) == sorted([sorted({id(b), id(cos)}), sorted({id(a), id(sin)})])


def _tables(cos: Value, sin: Value) -> tuple[Factor, Factor] | None:
    first, second = factor_of(cos), factor_of(sin)
    if first is None or second is None or (first.function, second.function) != ("cos", "sin"):
        return None
    same = first.angles is second.angles and (first.scale, first.spread) == (second.scale, second.spread)
    return (first, second) if same else None


def _rope(site: Site, x: Value, cos: Factor, layout: str, used: Value) -> Value | None:
    """The rotation of ``x``, [B, heads, T, width], or [B, T, heads, width] where the table that is ``used`` says so."""
    table = _table(site, cos) if x.type.rank == 4 else None
    if table is None:
        return None
    if used.type.rank < 4 or used.shape[1] == 1:
        return site.op("rope", x, *table, layout=layout)
    if used.shape[2] != 1:
        return None
    rope = site.op("rope", site.op("transpose", x, perm=(0, 2, 1, 3)), *table, layout=layout)
    return site.op("transpose", rope, perm=(0, 2, 1, 3))


def _table(site: Site, factor: Factor) -> list[Value] | None:
    """The table of a factor, placed where its angles are computed."""
    product = made_by(factor.angles, "mul")
    if product is None:
        return None
    for counted, frequencies in orders(product):
        positions, rates = _positions(counted), _rates(frequencies)
        if positions is None or rates is None:
            continue
        at = Site(site.graph, product)
        batched = positions if positions.type.rank == 2 else at.op("reshape", positions, shape=(1, *positions.shape))
        return site.graph.append(
            "rope_table", [batched, rates], {"scale": factor.scale}, scope=product.scope, before=product
        ).outputs
    return None


def _positions(value: Value) -> Value | None:
    """Positions [T] or [B, T] under casts and axes of size 1."""
    node = made_by(value, "cast", "reshape")
    if node is not None and _without_ones(node.input(0)) == _without_ones(value):
        return _positions(node.input(0))
    return value if not value.type.dtype.is_floating_point and value.type.rank in (1, 2) else None


def _rates(value: Value) -> Value | None:
    node = made_by(value, "reshape")
    if node is not None and _without_ones(node.input(0)) == _without_ones(value):
        value = node.input(0)
    return value if value.type.rank == 1 and value.type.dtype.is_floating_point else None


def partial_rotation(site: Site) -> Value | None:
    """Rotating the first part of each head and joining the rest behind it is one rotation."""
    if len(site.node.inputs) != 2 or site.node.attr("axis") != site.node.output.type.rank - 1:
        return None
    turned, passed = made_by(site.node.input(0), "rope"), last_axis_slice(site.node.input(1))
    first = None if turned is None else last_axis_slice(turned.input(0))
    if turned is None or passed is None or first is None or first[0] is not passed[0]:
        return None
    whole = (first[1], first[3], passed[1:]) == (0, 1, (first[2], first[0].shape[-1], 1))
    if not whole or turned.attr("layout") == "interleaved-to-half":
        return None
    return site.op("rope", first[0], *turned.inputs[1:], **turned.attrs)


RULES: dict[str, tuple[Rule, ...]] = {
    "add": (rotated_by_swapping,),
    "concat": (rotated_by_parts, partial_rotation),
    "reshape": (rotated_by_parts,),
}
