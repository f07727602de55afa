"""Selecting weights: by role, by glob on names, by layer, by shape, or by several of these at once."""

from __future__ import annotations

import ast
import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from compiler.errors import SelectorError
from compiler.ir.factored import roles_with_factors
from compiler.ir.graph import Graph, Param
from compiler.ir.layers import layer_of
from compiler.ir.roles import ROLES, has_role

Selector = str | Sequence[str] | Mapping[str, Any]
"""A role, a glob on parameter names, a list of either, or a mapping with the keys in ``KEYS``, which must all hold."""

KEYS = ("role", "name", "layers", "shape", "expect")

_Test = Callable[[Param], bool]


def resolve(graph: Graph, selector: Selector, skip: Sequence[str] = ()) -> list[Param]:
    """The weights that ``selector`` selects and no entry of ``skip`` does, in order of first use.

    An entry is a role, a glob on names (aliases count), or a part of a module path (``lm_head``). Raises
    SelectorError when nothing is left, when a number differs from ``expect``, when the selector is malformed, or when
    an entry of ``skip`` that is no role matches no weight at all.
    """
    known = roles_with_factors(graph)
    for entry in skip:
        if entry not in ROLES and not any(_named(param, entry) for param in graph.params.values()):
            raise SelectorError(
                f"`skip: {entry}` matches nothing in `{graph.name}`", remedy=_near(graph, entry, known), option="skip"
            )
    where = dict(selector) if isinstance(selector, Mapping) else {"any": selector}
    tests = [_test(key, value, known) for key, value in where.items() if key != "expect"]
    skipped = _any_entry(skip, known)
    matched = [param for param in _in_order(graph) if all(test(param) for test in tests)]
    kept = [param for param in matched if not skipped(param)]
    if not kept:
        raise _nothing(graph, selector, known, len(matched))
    expected = where.get("expect")
    if expected is not None and expected != len(kept):
        raise SelectorError(
            f"{_shown(selector)} selects {len(kept)} weights, not {expected}",
            remedy=f"they are {_some([param.name for param in kept])}",
        )
    return kept


def _in_order(graph: Graph) -> list[Param]:
    used = (value for node in graph.nodes for value in node.inputs if isinstance(value, Param) and value.persistent)
    return list(dict.fromkeys(used))


def _test(key: str, value: Any, known: Mapping[Param, set[str]]) -> _Test:
    match key:
        case "any":
            return _any_entry([value] if isinstance(value, str) else value, known)
        case "role":
            return _any_role(value, known)
        case "name":
            return _any_of([lambda param, name=name: _named(param, name) for name in _texts(key, value)])
        case "layers":
            return _in_layers(value)
        case "shape":
            return _shaped(value)
        case _:
            near = difflib.get_close_matches(key, KEYS, 1)
            remedy = f"did you mean `{near[0]}`?" if near else f"it can have: {', '.join(KEYS)}"
            raise SelectorError(f"a selector has no key `{key}`", remedy=remedy)


def _texts(key: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise SelectorError(
            f"`{key}` must be a text or a list of texts, not {value!r}",
            remedy="write `role: mlp`, or `role: [attention, mlp]`",
        )
    return [str(text) for text in texts]


def _any_of(tests: Sequence[_Test]) -> _Test:
    return lambda param: any(test(param) for test in tests)


def _any_entry(entries: Any, known: Mapping[Param, set[str]]) -> _Test:
    return _any_of([_entry(entry, known) for entry in _texts("where", entries)])


def _entry(entry: str, known: Mapping[Param, set[str]]) -> _Test:
    if entry in ROLES:
        return lambda param: has_role(known.get(param, set()), entry)
    return lambda param: _named(param, entry)


def _any_role(value: Any, known: Mapping[Param, set[str]]) -> _Test:
    names = _texts("role", value)
    for name in names:
        if name not in ROLES:
            near = difflib.get_close_matches(name, ROLES, 1)
            remedy = f"did you mean `{near[0]}`?" if near else f"roles: {', '.join(ROLES)}"
            raise SelectorError(f"there is no role `{name}`", remedy=remedy)
    return _any_of([_entry(name, known) for name in names])


def _named(param: Param, pattern: str) -> bool:
    """Whether a name of ``param`` matches a glob, or holds ``pattern`` as whole parts (``lm_head``, ``layers.3``)."""
    return any(fnmatchcase(name, pattern) or f".{pattern}." in f".{name}." for name in (param.name, *param.aliases))


def _in_layers(value: Any) -> _Test:
    chosen: set[int] = set()
    for part in str(value).split(","):
        span = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if span is None or isinstance(value, bool):
            raise SelectorError(
                f"`layers` must be like 0-11,20, not {value!r}",
                remedy="write numbers and ranges of layers, with commas between",
            )
        chosen.update(range(int(span[1]), int(span[2] or span[1]) + 1))
    return lambda param: layer_index(param) in chosen


def layer_index(param: Param) -> int | None:
    """The number of the layer whose nodes use ``param`` first, or None."""
    layer = next((layer_of(node.scope) for node in param.users), None)
    return layer.index if layer else None


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _shaped(value: Any) -> _Test:
    """A predicate over ``out`` and ``in`` (the last two sizes), ``numel`` and ``rank``; false for vectors."""
    try:
        tree = ast.parse(re.sub(r"\bin\b", "in_", str(value)), mode="eval").body
        _compute(tree, {"out": 1, "in_": 1, "numel": 1, "rank": 1})
    except (SyntaxError, KeyError, TypeError, ZeroDivisionError) as reason:
        raise SelectorError(
            f"`shape` cannot be read: {value!r}", remedy="write it like: out >= 1024 and in % 128 == 0"
        ) from reason
    return lambda param: param.type.rank > 1 and bool(_compute(tree, _sizes(param)))


def _sizes(param: Param) -> dict[str, int]:
    shape = param.type.static_shape
    return {"out": shape[-2], "in_": shape[-1], "numel": param.type.numel, "rank": len(shape)}


def _compute(tree: ast.expr, sizes: Mapping[str, int]) -> Any:
    match tree:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return sizes[name]
        case ast.BoolOp(op=op, values=parts):
            results = [_compute(part, sizes) for part in parts]
            return all(results) if isinstance(op, ast.And) else any(results)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return not _compute(part, sizes)
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_compute(left, sizes), _compute(right, sizes))
        case ast.Compare(left=left, ops=ops, comparators=rights):
            values = [_compute(part, sizes) for part in (left, *rights)]
            return all(_COMPARISONS[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
        case _:
            raise TypeError(ast.dump(tree))


def _nothing(graph: Graph, selector: Selector, known: Mapping[Param, set[str]], matched: int) -> SelectorError:
    if matched:
        return SelectorError(
            f"{_shown(selector)} selects {matched} weights, but `skip` leaves none of them",
            remedy="skip less, or remove the pass",
            option="skip",
        )
    return SelectorError(
        f"{_shown(selector)} selects nothing in `{graph.name}`", remedy=_near(graph, str(selector), known)
    )


def _near(graph: Graph, text: str, known: Mapping[Param, set[str]]) -> str:
    present = [role for role in ROLES if any(has_role(names, role) for names in known.values())]
    names = [name for param in _in_order(graph) for name in (param.name, *param.aliases)]
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    near = difflib.get_close_matches(text, [*present, *names, *sorted(parts)], 1, cutoff=0.7)
    meant = f"*.{text}.*" if near == [text] else near[0] if near else ""  # a module, where no weight has that role
    hint = f"did you mean `{meant}`? " if meant else ""
    return f"{hint}roles present: {', '.join(present)}"


def _shown(selector: Selector) -> str:
    if isinstance(selector, str):
        return f"`{selector}`"
    if isinstance(selector, Mapping):
        return "`{" + ", ".join(f"{key}: {value}" for key, value in selector.items()) + "}`"
    return f"`[{', '.join(selector)}]`"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
