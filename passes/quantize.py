"""Round weights to integers of a few bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from compiler.errors import PassError
from compiler.ir.facts import expert_sites
from compiler.ir.graph import Graph, Node, Param
from compiler.ir.select import Selector
from compiler.pipeline import Context, Pass
from compiler.weights.expr import Expr
from compiler.weights.ops.quant import quantise

# operands that are matrices [..., out, in], by operation
MATRIX_OPERANDS = {"linear": (1,), "embedding": (0,), "experts": (3, 4), "latent_attention": (3,)}

ROUTER = "is a router: rounding it changes which experts are chosen"


@dataclass(frozen=True)
class Quantize(Pass):
    """Round every selected weight to the nearest of 2^bits evenly spaced values a group.

    w ~ (q - z) * s with q = clamp(round(w / s + z), -2^(bits-1), 2^(bits-1) - 1). A group is ``group`` consecutive
    inputs of one output row (0: the whole row) and has its own scale s, kept in the weight's storage dtype;
    symmetric codes have z = 0, asymmetric ones an integer zero point a group. No calibration data is needed.

    ``scale: minmax`` takes the smallest scale that clips nothing; ``search`` takes, group by group, the one of least
    squared error among ten or so candidates, which clip up to 60 % of the range. More bits never give a larger error.
    ``tied: copy`` also quantises a head that shares its tensor with the embedding: the embedding stays dense
    and the head gets its own quantised copy; by default such a weight is left alone.

    Never exact. Round to nearest is the baseline that every method of quantisation is measured against.
    """

    where: Selector = "linear"
    skip: tuple[str, ...] = ()
    bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    group: int = 0
    symmetric: bool = True
    scale: Literal["search", "minmax"] = "search"
    tied: Literal["skip", "copy"] = "skip"

    exact_when: ClassVar = None
    edits_weights: ClassVar[bool] = False
    quantises: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when the group divides no selected input width, or nothing can be quantised."""
        chosen: list[Param] = []
        routers = {site.router.input(1) for site in expert_sites(graph) if site.router is not None}
        for param in ctx.select(self.where, skip=self.skip):
            reason = ROUTER if param in routers else _refusal(param)
            if reason:
                ctx.skipped(param.name, reason)
            elif not _is_tied(param):
                chosen.append(param)
            elif self.tied == "copy":
                chosen.append(_untie(graph, param))
            else:
                ctx.skipped(param.name, "shares its tensor with the embedding; `tied: copy` gives the head a copy")
        self._check_groups(chosen)
        for param in chosen:
            dense = param.expr
            param.expr = self._quantised(param)
            ctx.rewrote(param.name, self._scheme(), bytes_before=dense.type.with_dtype(param.storage).nbytes)

    def _quantised(self, param: Param) -> Expr:
        return quantise(
            param.expr,
            self.bits,
            self.group,
            symmetric=self.symmetric,
            search=self.scale == "search",
            scale_dtype=param.storage,
        )

    def _scheme(self) -> str:
        per = f"groups of {self.group}" if self.group else "one scale a row"
        return f"int{self.bits}, {'symmetric' if self.symmetric else 'asymmetric'}, {per}"

    def _check_groups(self, params: list[Param]) -> None:
        if self.group < 0:
            raise PassError(f"group {self.group} is negative", option="group", remedy="0 is one scale a row")
        wrong = [param for param in params if self.group and _width(param) % self.group]
        if not wrong:
            return
        first = wrong[0]
        more = f" (nor that of {len(wrong) - 1} more weights)" if len(wrong) > 1 else ""
        raise PassError(
            f"groups of {self.group} do not divide {_width(first)}, the input width of {first.name}{more}",
            remedy=f"groups that divide every selected width: {_nearest_groups(params, self.group)}; "
            "0 is one scale a row; `skip` leaves weights out",
            option="group",
        )


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
    if param.expr.op == "dequantize":
        return f"is quantised already, to {param.expr.attr('bits')} bits"
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
