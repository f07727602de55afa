"""What a person would write for operations on one tensor or two: arithmetic, sums along axes, changes of layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backends.torch_module.code import AND, ATOM, COMPARISON, OR, PRODUCT, SUM, UNARY, Code, binary, number
from backends.torch_module.site import Emitter, Site, arg
from compiler.ir.types import Dim

# --- one tensor ----------------------------------------------------------------------------------------------


def _function(name: str) -> Emitter:
    return lambda site: Code(f"{name}({arg(site, 0).text})")


def _method(name: str) -> Emitter:
    return lambda site: Code(f"{arg(site, 0).atom}.{name}()")


def _negated(operator: str) -> Emitter:
    return lambda site: Code(f"{operator}{arg(site, 0).within(UNARY)}", UNARY)


def _gelu(site: Site) -> Code:
    approximate = ', approximate="tanh"' if site.node.attr("approximate") == "tanh" else ""
    return Code(f"F.gelu({arg(site, 0).text}{approximate})")


def _fake_quantize(site: Site) -> Code:
    name, options = site.helper("fake_quantize"), [arg(site, 0).text]
    options += [f"bits={site.node.attr('bits')}"] if site.node.attr("type") == "int" else []
    options += [f"scale={number(site.node.attr('scale'))}"] if site.node.attr("scale") else []
    return Code(f"{name}({', '.join(options)})")


def _cast(site: Site) -> Code:
    dtype: torch.dtype = site.node.attr("dtype")
    return Code(f"{arg(site, 0).atom}.to({dtype})")


# --- two tensors, or a tensor and a number -------------------------------------------------------------------


def _second(site: Site) -> Code:
    scalar = site.node.attr("scalar")
    if scalar is None:
        return arg(site, 1)
    whole = not site.node.input(0).type.dtype.is_floating_point
    text = number(int(scalar) if whole else scalar)
    return Code(text, UNARY if text.startswith("-") else ATOM)


def _operator(symbol: str, strength: int) -> Emitter:
    return lambda site: binary(arg(site, 0), symbol, _second(site), strength)


def _power(site: Site) -> Code:
    return Code(f"{arg(site, 0).atom}.pow({_second(site).text})")


def _bound(function: str, keyword: str) -> Emitter:
    def emit(site: Site) -> Code:
        if site.node.attr("scalar") is None:
            return Code(f"torch.{function}({arg(site, 0).text}, {arg(site, 1).text})")
        return Code(f"{arg(site, 0).atom}.clamp({keyword}={_second(site).text})")

    return emit


RELATIONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _compare(site: Site) -> Code:
    return binary(arg(site, 0), RELATIONS[site.node.attr("relation")], _second(site), COMPARISON)


def _where(site: Site) -> Code:
    return Code(f"torch.where({', '.join(arg(site, index).text for index in range(3))})")


# --- along axes ----------------------------------------------------------------------------------------------


def _axis(axis: int, rank: int) -> int:
    """The last axis as -1, as people write it."""
    return -1 if axis % rank == rank - 1 else axis


def _reduced(method: str) -> Emitter:
    def emit(site: Site) -> Code:
        rank = site.node.input(0).type.rank
        axes = [_axis(axis, rank) for axis in site.node.attr("axes")]
        shown = str(axes[0]) if len(axes) == 1 else str(tuple(axes))
        keep = ", keepdim=True" if site.node.attr("keep") else ""
        return Code(f"{arg(site, 0).atom}.{method}(dim={shown}{keep})")

    return emit


def _along(method: str) -> Emitter:
    def emit(site: Site) -> Code:
        axis = _axis(site.node.attr("axis"), site.node.input(0).type.rank)
        return Code(f"{arg(site, 0).atom}.{method}(dim={axis})")

    return emit


def _topk(site: Site) -> Code:
    axis = _axis(site.node.attr("axis"), site.node.input(0).type.rank)
    return Code(f"{arg(site, 0).atom}.topk({site.size('count')}, dim={axis})")


def _indexed(method: str) -> Emitter:
    def emit(site: Site) -> Code:
        axis = _axis(site.node.attr("axis"), site.node.input(0).type.rank)
        value = f", {number(site.node.attr('value'))}" if "value" in site.node.op.attrs else ""
        return Code(f"{arg(site, 0).atom}.{method}({axis}, {arg(site, 1).text}{value})")

    return emit


def _take(site: Site) -> Code:
    axis, index = site.node.attr("axis") % site.node.input(0).type.rank, arg(site, 1).text
    return Code(f"{arg(site, 0).atom}[{':, ' * axis}{index}]")


# --- layout --------------------------------------------------------------------------------------------------


def _reshape(site: Site) -> Code:
    before, after, x = site.node.input(0).shape, site.node.output.shape, arg(site, 0)
    gone = [axis for axis in range(len(before)) if before[axis] == 1 and (*before[:axis], *before[axis + 1 :]) == after]
    added = [axis for axis in range(len(after)) if after[axis] == 1 and (*after[:axis], *after[axis + 1 :]) == before]
    if gone:
        return Code(f"{x.atom}.squeeze({gone[0]})")
    if added:
        return Code(f"{x.atom}.unsqueeze({added[0]})")
    return _flattened(site, x, before, after) or Code(f"{x.atom}.reshape({', '.join(_shape(site))})")


def _flattened(site: Site, x: Code, before: Sequence[Dim], after: Sequence[Dim]) -> Code | None:
    """Neighbouring axes joined into one."""
    joined = len(before) - len(after)
    for start in range(len(after)):
        stop = start + joined
        if joined > 0 and (*before[:start], *before[stop + 1 :]) == (*after[:start], *after[start + 1 :]):
            last = -1 if stop == len(before) - 1 else stop
            return Code(f"{x.atom}.flatten({start}{f', {last}' if last != -1 else ''})")
    return None


def _shape(site: Site) -> list[str]:
    """The sizes of a ``shape`` attribute; one that is symbolic is left to torch."""
    dims: tuple[Dim, ...] = site.node.attr("shape")
    symbolic = [index for index, dim in enumerate(dims) if isinstance(dim, str)]
    free = symbolic[-1] if symbolic and site.node.op.name == "reshape" else -1
    shown: list[str] = []
    for index, dim in enumerate(dims):
        known = site.dim(dim) if isinstance(dim, str) and index != free else site.size("shape", index)
        shown.append("-1" if index == free else known)
    return shown


def _transpose(site: Site) -> Code:
    perm: tuple[int, ...] = site.node.attr("perm")
    moved = [axis for axis, place in enumerate(perm) if axis != place]
    if len(moved) == 2:
        return Code(f"{arg(site, 0).atom}.transpose({moved[0]}, {moved[1]})")
    return Code(f"{arg(site, 0).atom}.permute({', '.join(map(str, perm))})")


def _slice(site: Site) -> Code:
    node = site.node
    rank = node.input(0).type.rank
    axis = node.attr("axis") % rank
    start = "" if node.attr("start") == 0 else _end(site, "start")
    whole = node.attr("stop") == node.input(0).shape[axis]
    stop = "" if whole else _end(site, "stop")
    step = f":{node.attr('step')}" if node.attr("step") != 1 else ""
    if not (start or stop or step):
        return arg(site, 0)
    before = "..., " if axis == rank - 1 and rank > 1 else ":, " * axis
    text = f"{start}:{stop}" if _simple(start) and _simple(stop) else f"{start} : {stop}".strip()
    return Code(f"{arg(site, 0).atom}[{before}{_spaced(text)}{step}]")


def _simple(text: str) -> bool:
    return text.replace("-", "").isalnum() or not text


def _spaced(text: str) -> str:
    return f" {text}".strip() if not text.startswith(":") or text[1:].strip().isalnum() else text


def _end(site: Site, name: str) -> str:
    value = site.node.attr(name)
    return site.dim(value) if isinstance(value, str) else site.size(name)


def _concat(site: Site) -> Code:
    parts = ", ".join(part.text for part in site.args if part is not None)
    axis = _axis(site.node.attr("axis"), site.node.output.type.rank)
    return Code(f"torch.cat(({parts}), dim={axis})")


def _expand(site: Site) -> Code:
    before, after = site.node.input(0).shape, site.node.output.shape
    added = len(after) - len(before)
    shown = ["-1" if i >= added and before[i - added] == dim else text for i, (dim, text) in _numbered(site, after)]
    return Code(f"{arg(site, 0).atom}.expand({', '.join(shown)})")


def _numbered(site: Site, dims: Sequence[Dim]) -> list[tuple[int, tuple[Dim, str]]]:
    return [(i, (dim, site.dim(dim) if isinstance(dim, str) else site.size("shape", i))) for i, dim in enumerate(dims)]


def _arange(site: Site) -> Code:
    start = "" if site.node.attr("start") == 0 else f"{_end(site, 'start')}, "
    return Code(f"torch.arange({start}{_end(site, 'stop')}, device={site.like()}.device)")


def _full(site: Site) -> Code:
    dims: tuple[Dim, ...] = site.node.attr("shape")
    shown = [site.dim(dim) if isinstance(dim, str) else site.size("shape", i) for i, dim in enumerate(dims)]
    shape = f"({', '.join(shown)}{',' if len(shown) == 1 else ''})"
    dtype: torch.dtype = site.node.attr("dtype")
    value = number(site.node.attr("value"))
    if dtype.is_floating_point and (like := site.like(dtype)):
        return Code(f"{like}.new_full({shape}, {value})")
    return Code(f"torch.full({shape}, {value}, dtype={dtype}, device={site.like()}.device)")


def _pad(site: Site) -> Code:
    before, after = site.node.attr("before"), site.node.attr("after")
    widths = [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
    while len(widths) > 2 and widths[-2:] == [0, 0]:
        del widths[-2:]
    value = site.node.attr("value")
    shown = f", value={number(value)}" if value else ""
    return Code(f"F.pad({arg(site, 0).text}, ({', '.join(map(str, widths))}){shown})")


def _split_heads(site: Site) -> Code:
    x = arg(site, 0).atom
    if site.node.attr("heads") == 1:
        return Code(f"{x}.unsqueeze(1)")
    return Code(f"{x}.unflatten(-1, ({site.size('heads')}, -1)).transpose(1, 2)")


TENSOR_EMITTERS: dict[str, Emitter] = {
    "matmul": lambda site: binary(arg(site, 0), "@", arg(site, 1), PRODUCT),
    "split_heads": _split_heads,
    "merge_heads": lambda site: Code(f"{arg(site, 0).atom}.flatten(2)"),
    "neg": _negated("-"),
    "abs": _method("abs"),
    "exp": _method("exp"),
    "log": _method("log"),
    "sqrt": _method("sqrt"),
    "rsqrt": _method("rsqrt"),
    "sin": _method("sin"),
    "cos": _method("cos"),
    "tanh": _function("torch.tanh"),
    "sigmoid": _function("torch.sigmoid"),
    "relu": _function("F.relu"),
    "silu": _function("F.silu"),
    "gelu": _gelu,
    "logical_not": _negated("~"),
    "cast": _cast,
    "fake_quantize": _fake_quantize,
    "add": _operator("+", SUM),
    "sub": _operator("-", SUM),
    "mul": _operator("*", PRODUCT),
    "div": _operator("/", PRODUCT),
    "pow": _power,
    "minimum": _bound("minimum", "max"),
    "maximum": _bound("maximum", "min"),
    "logical_and": _operator("&", AND),
    "logical_or": _operator("|", OR),
    "compare": _compare,
    "where": _where,
    "sum": _reduced("sum"),
    "mean": _reduced("mean"),
    "max": _reduced("amax"),
    "argmax": _along("argmax"),
    "softmax": _along("softmax"),
    "cumsum": _along("cumsum"),
    "topk": _topk,
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "concat": _concat,
    "expand": _expand,
    "arange": _arange,
    "full": _full,
    "gather": _indexed("gather"),
    "take": _take,
    "scatter": _indexed("scatter"),
    "pad": _pad,
}
"""What is written for each of these operations."""
