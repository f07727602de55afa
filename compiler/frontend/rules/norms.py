"""RMS and layer norms from their arithmetic."""

from __future__ import annotations

from compiler.ir.graph import Node, Param, Value
from compiler.rewrite.pattern import Match, attr, either, op, rule, var
from compiler.rewrite.site import Refused, Rule, Site, made_by, orders, scalar_of

_X = var("x")
_SQUARE = either(op("pow", _X, scalar=2.0), op("mul", _X, _X))
_MEAN_SQUARE = op("mean", _SQUARE, axes=attr("axes"), keep=True)


@rule(op("mul", _X, op("rsqrt", op("add", _MEAN_SQUARE, scalar=attr("eps")))))
def normalised(site: Site, found: Match) -> Value | Refused:
    """x * rsqrt(mean(x^2) + eps) is a norm without a weight."""
    x = found.value("x")
    if found["axes"] != (x.type.rank - 1,) or found["eps"] is None:
        return Refused("the mean is not over the last axis, or nothing fixed is added to it")
    return site.op("rms_norm", x, eps=found["eps"])


def _over_last_axis(node: Node) -> bool:
    return node.attr("axes") == (node.input(0).type.rank - 1,) and node.attr("keep")


def weighted(site: Site) -> Value | None:
    """A norm times a vector, or times a number plus a vector, is a norm with a weight."""
    for weight, value in orders(site.node):
        norm = made_by(value, "rms_norm", "layer_norm")
        if norm is None or len(norm.inputs) != 1 or norm.output.shape != site.node.output.shape:
            continue
        vector, offset = _offset_vector(weight)
        if vector is None or (offset and norm.op.name == "layer_norm"):
            continue
        attrs = {**norm.attrs, **({"offset": offset} if offset else {})}
        return site.op(norm.op.name, norm.input(0), vector, **attrs)
    return None


def _offset_vector(weight: Value) -> tuple[Param | None, float]:
    shifted = made_by(weight, "add")
    offset = None if shifted is None else scalar_of(shifted)
    vector = weight if shifted is None or offset is None else shifted.input(0)
    return (vector if isinstance(vector, Param) and vector.type.rank == 1 else None), offset or 0.0


def centred(site: Site) -> Value | None:
    """The RMS norm of x - mean(x) is the layer norm of x."""
    difference = made_by(site.node.input(0), "sub")
    if difference is None or len(difference.inputs) != 2 or site.node.attr("offset"):
        return None
    x, mean = difference.input(0), made_by(difference.inputs[1], "mean")
    if mean is None or mean.input(0) is not x or not _over_last_axis(mean):
        return None
    return site.op("layer_norm", x, *site.node.inputs[1:], eps=site.node.attr("eps"))


def bias_of_layer_norm(site: Site) -> Value | None:
    """A weighted layer norm plus a vector is a layer norm with a bias."""
    for bias, value in orders(site.node):
        norm = made_by(value, "layer_norm")
        is_vector = isinstance(bias, Param) and bias.type.rank == 1
        if norm is not None and is_vector and len(norm.inputs) == 2 and norm.output.single_user() is site.node:
            return site.op("layer_norm", norm.input(0), norm.input(1), bias, eps=norm.attr("eps"))
    return None


RULES: dict[str, tuple[Rule, ...]] = {
    "mul": (normalised, weighted),
    "rms_norm": (centred,),
    "add": (bias_of_layer_norm,),
}
