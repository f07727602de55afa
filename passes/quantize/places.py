"""Which of the selected weights can be quantised, which groups fit them, and options that do not go together."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compiler.errors import PassError
from compiler.ir.facts import expert_sites
from compiler.ir.graph import Graph, Node, Param
from compiler.pipeline import Context
from compiler.weights.ops.codec import code_bits, is_quantised
from passes.quantize.numbers import FREE, TABLE_BITS, TABLES

# operands that are matrices [..., out, in], by operation
MATRIX_OPERANDS = {"linear": (1,), "embedding": (0,), "experts": (3, 4), "latent_attention": (3,)}

DAMPING = 0.01  # of the mean energy of inputs, unless given
STEPS = 200  # of learning, unless given
OTHER_GROUPS = "`int` has groups of any size, `fp8` none"
TIED = "shares its tensor with the embedding; `tied: copy` gives the head a copy, `share` quantises it for both"
ROUTER = "is a router: rounding it changes which experts are chosen"


def chosen_of(graph: Graph, ctx: Context, params: Sequence[Param], tied: str) -> list[Param]:
    """Those of ``params`` that can be quantised, tied heads as copies if ``tied`` says so; others are reported."""
    chosen: list[Param] = []
    routers = {site.router.input(1) for site in expert_sites(graph) if site.router is not None}
    for param in params:
        reason = ROUTER if param in routers else _refusal(param)
        if reason:
            ctx.skipped(param.name, reason)
        elif not _is_tied(param) or tied == "share":
            chosen.append(param)
        elif tied == "copy":
            chosen.append(_untie(graph, param))
        else:
            ctx.skipped(param.name, TIED)
    return chosen


def check_groups(params: list[Param], group: int, system: str = "") -> None:
    """Raises PassError when ``group`` (0: a whole row) does not divide the input width of every weight.

    ``system`` names a number system whose groups cannot be chosen.
    """
    if group < 0:
        raise PassError(f"group {group} is negative", option="group", remedy="0 is one scale a row")
    wrong = [param for param in params if group and _width(param) % group]
    if not wrong:
        return
    first = wrong[0]
    more = f" (nor that of {len(wrong) - 1} more weights)" if len(wrong) > 1 else ""
    which = f"do not divide {_width(first)}, the input width of {first.name}{more}"
    if system:
        raise PassError(
            f"{system} has groups of {group}, which {which}",
            remedy=f"`skip` leaves weights out; {OTHER_GROUPS}",
            option="type",
        )
    raise PassError(
        f"groups of {group} {which}",
        remedy=f"groups that divide every selected width: {_nearest_groups(params, group)}; "
        "0 is one scale a row; `skip` leaves weights out",
        option="group",
    )


def check_widths(bits: float, widths: Sequence[int], type: str) -> None:
    """Raises PassError when matrices cannot get ``widths`` that are ``bits`` on average."""
    if type in TABLES and not {*widths, math.floor(bits), math.ceil(bits)} <= {*TABLE_BITS}:
        raise PassError(
            f"{type} has 2 to 4 bits", option="widths" if widths else "bits", remedy="say `widths: [2, 3, 4]`"
        )
    if type not in FREE:
        raise PassError(f"{type} has one width", option="bits", remedy="leave `bits` and `widths` out, or use `int`")
    if widths and not min(widths) <= bits <= max(widths):
        raise PassError(
            f"no widths out of {', '.join(map(str, widths))} are {bits:g} bits on average",
            option="widths",
            remedy="give widths on both sides of `bits`",
        )


def check_experts(experts: str, type: str, learn: str, zeros: str, *, mixed: bool) -> None:
    """Raises PassError where experts of one stack are to differ, and nothing lets them."""
    if experts == "alike":
        return
    if not mixed:
        raise PassError("all weights have the same bits", option="experts", remedy="say `bits: 2.5`, or give `widths`")
    if type != "int":
        raise PassError(f"stacks hold {type} of one width", option="experts", remedy="use `type: int`")
    if zeros == "real":
        raise PassError("stacks hold real zero points of one width", option="experts", remedy="leave `zeros` out")
    if learn != "none":
        raise PassError("codes of experts apart are not learned", option="experts", remedy="leave `learn` out")


def check_searchable(type: str, *, solved: bool) -> None:
    """Raises PassError where the size of groups cannot be searched for."""
    if type != "int":
        raise PassError(f"groups of {type} are not searched for", option="group", remedy="use `type: int`")
    if solved:
        raise PassError(
            "groups are searched for where weights are rounded to nearest", option="group", remedy="give a size"
        )


def check_damping(damping: float | str, *, solved: bool) -> None:
    """Raises PassError when nothing is solved for, so that nothing would be damped."""
    if damping != DAMPING and not solved:
        raise PassError("rounding to nearest has no damping", option="damping", remedy="say `method: gptq`")


def check_learnable(learn: str, type: str, zeros: str, steps: int) -> None:
    """Raises PassError when codes of ``type`` are not evenly spaced, which is what is learned, or none are learned in
    ``steps`` that are given."""
    if learn == "none" and steps != STEPS:
        raise PassError("nothing is learned, in however many steps", option="steps", remedy="say `learn: rounding`")
    if learn != "none" and zeros == "real":
        raise PassError("codes with real zero points are not learned", option="learn", remedy="leave `zeros` out")
    if learn != "none" and type != "int":
        raise PassError(f"codes of {type} are not learned", option="learn", remedy="use `type: int`")


def report(ctx: Context, param: Param, how: str, **numbers: float) -> None:
    """Say that ``param``, which still has its dense expression, is quantised."""
    ctx.rewrote(param.name, how, bytes_before=param.expr.type.with_dtype(param.storage).nbytes, **numbers)


def _width(param: Param) -> int:
    return param.type.static_shape[-1]


def _nearest_groups(params: list[Param], group: int) -> str:
    """The divisors common to all widths that lie nearest to ``group``, by ratio."""
    common = math.gcd(*(_width(param) for param in params))
    divisors = [size for size in range(2, common + 1) if common % size == 0]
    nearest = sorted(divisors, key=lambda size: abs(math.log(size / group)))[:3]
    return ", ".join(map(str, nearest)) or "none"


def _refusal(param: Param) -> str:
    """Why a weight cannot be quantised; "" when it can."""
    if is_quantised(param.expr):
        return f"is quantised already, to {code_bits(param.expr)} bits"
    if param.type.rank not in (2, 3) or not param.storage.is_floating_point:
        return f"is no matrix of floats but {param.type}"
    others = [node.op.name for node in param.users if not _reads_as_matrix(node, param)]
    return f"is read by `{others[0]}`, and not as a matrix that can be quantised" if others else ""


def _reads_as_matrix(node: Node, param: Param) -> bool:
    operands = [index for index, value in enumerate(node.inputs) if value is param]
    return set(operands) <= set(MATRIX_OPERANDS.get(node.op.name, ()))


def _is_tied(param: Param) -> bool:
    operations = {node.op.name for node in param.users}
    return "embedding" in operations and len(operations) > 1


def _untie(graph: Graph, param: Param) -> Param:
    """Give the linear maps that read an embedding's table a parameter of their own."""
    heads = [node for node in param.users if node.op.name != "embedding"]
    name = _own_name(param, heads[0])
    copy = graph.add_param(name, param.expr, param.storage, dtype=param.type.dtype)
    for node in heads:
        for index, value in enumerate(node.inputs):
            if value is param:
                graph.set_input(node, index, copy)
    param.aliases = tuple(alias for alias in param.aliases if alias != name)
    return copy


def _own_name(param: Param, head: Node) -> str:
    fallback = f"{head.scope or 'head'}.weight"
    return next((alias for alias in param.aliases if alias.startswith(f"{head.scope}.")), fallback)
