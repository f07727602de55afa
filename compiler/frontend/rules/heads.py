"""Attention as the graph wants it: heads split and merged, scales in the attention, fused projections apart."""

from __future__ import annotations

from compiler.frontend.params import part, rebind
from compiler.ir.graph import Node, Param, Value
from compiler.rewrite.site import Rule, Site, last_axis_slice, made_by, orders, scalar_of
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import reshape, slice, transpose

_SWAP = (0, 2, 1, 3)


# --- heads ---------------------------------------------------------------------------------------------------


def split(site: Site) -> Value | None:
    """[B, T, H*d] viewed as [B, T, H, d] and transposed to [B, H, T, d]."""
    view = made_by(site.node.input(0), "reshape")
    if view is None or site.node.attr("perm") != _SWAP:
        return None
    x, (batch, tokens, heads, _) = view.input(0), view.output.shape
    if x.shape[:2] != (batch, tokens) or x.type.rank != 3 or not isinstance(heads, int):
        return None
    return site.op("split_heads", x, heads=heads)


def norm_of_heads(site: Site) -> Value | None:
    """A norm over each head does not care about the order of the other axes."""
    norm = made_by(site.node.input(0), "rms_norm", "layer_norm")
    if norm is None or site.node.attr("perm") != _SWAP:
        return None
    swapped = site.op("transpose", norm.input(0), perm=_SWAP)
    return site.op(norm.op.name, swapped, *norm.inputs[1:], **norm.attrs)


def merge(site: Site) -> Value | None:
    """[B, T, H, v] as attention yields it, viewed as [B, T, H*v]."""
    heads = made_by(site.node.input(0), "attention", "latent_attention")
    if heads is None or site.node.output.shape[:2] != heads.output.shape[:2] or site.node.output.type.rank != 3:
        return None
    return site.op("merge_heads", heads.output)


def single_head(site: Site) -> Value | None:
    """A rotated [B, 1, T, d] that is a view of [B, T, d] is one head."""
    view = made_by(site.node.input(0), "reshape")
    if view is None:
        return None
    x, shape = view.input(0), view.output.shape
    if x.type.rank != 3 or shape != (x.shape[0], 1, *x.shape[1:]):
        return None
    return site.op("rope", site.op("split_heads", x, heads=1), *site.node.inputs[1:], **site.node.attrs)


def scaled_heads(site: Site) -> Value | None:
    """A number times x, split into heads, is split first."""
    product = made_by(site.node.input(0), "mul")
    scalar = None if product is None else scalar_of(product)
    if product is None or scalar is None:
        return None
    return site.op("mul", site.op("split_heads", product.input(0), **site.node.attrs), scalar=scalar)


def scaled_query(site: Site) -> Value | None:
    """A number times the query belongs to the attention's scale."""
    product = made_by(site.node.input(0), "mul")
    scalar = None if product is None else scalar_of(product)
    if product is None or scalar is None:
        return None
    attrs = {**site.node.attrs, "scale": site.node.attr("scale") * scalar}
    return site.op("attention", product.input(0), *site.node.inputs[1:], **attrs)


def no_bias(site: Site) -> Value | None:
    """A bias of zeros is none."""
    inputs = [*site.node.inputs, None, None][:6]
    zeros = made_by(inputs[4], "full")
    if zeros is None or zeros.attr("value") != 0.0:
        return None
    return site.op("attention", *inputs[:4], None, inputs[5], **site.node.attrs)


# --- linear maps ---------------------------------------------------------------------------------------------


def transposed_weight(site: Site) -> Value | None:
    """x @ W with a stored W [in, out] is a linear map whose weight is W transposed."""
    weight = site.node.input(1)
    if not isinstance(weight, Param) or weight.type.rank != 2 or weight.aliases:
        return None
    if any(user.op.name != "matmul" or user.inputs[1] is not weight for user in weight.users):
        return None
    users = list(weight.users)
    turned = rebind(site.graph, weight, transpose(weight.expr))
    for user in users:
        at = Site(site.graph, user)
        site.graph.replace(user.output, at.op("linear", user.input(0), turned))
    return None


def bias_of_linear(site: Site) -> Value | None:
    """A linear map plus a vector is a linear map with a bias."""
    for bias, value in orders(site.node):
        linear = made_by(value, "linear")
        is_vector = isinstance(bias, Param) and bias.shape == value.shape[-1:]
        if linear is not None and is_vector and len(linear.inputs) == 2 and linear.output.single_user() is site.node:
            return site.op("linear", *linear.inputs, bias)
    return None


def unfuse_attention(site: Site) -> Value | None:
    """Query, key and value that are slices of one projection become projections of their own."""
    fused = [source for source in map(_sliced_source, site.node.inputs[:3]) if source is not None]
    for source in fused:
        if fused.count(source) > 1:
            return _unfuse(site, source)
    return None


def unfuse_gate(site: Site) -> Value | None:
    """A gate and what it gates, slices of one projection, become projections of their own."""
    for gate, up in orders(site.node):
        activated = made_by(gate, "silu", "gelu", "relu", "sigmoid")
        source = None if activated is None else _sliced_source(activated.input(0))
        if source is not None and _sliced_source(up) is source:
            return _unfuse(site, source)
    return None


def _sliced_source(value: Value | None) -> Node | None:
    """The linear map that ``value`` is a slice of, under what happens to each head."""
    while (node := made_by(value, "rope", "rms_norm", "layer_norm", "split_heads", "reshape", "mul")) is not None:
        if node.op.name == "mul" and scalar_of(node) is None:
            return None
        value = node.input(0)
    taken = None if value is None else last_axis_slice(value)
    heads = None if taken is None else made_by(taken[0], "split_heads")
    return None if taken is None else made_by(taken[0] if heads is None else heads.input(0), "linear")


def _unfuse(site: Site, linear: Node) -> Value | None:
    """Replace every slice of a linear map's output by a linear map over that part of the weight."""
    heads = linear.output.single_user()
    split = heads if heads is not None and heads.op.name == "split_heads" else None
    slices = list((linear if split is None else split).output.users)
    if any(last_axis_slice(user.outputs[0]) is None or user.attr("step") != 1 for user in slices):
        return None
    if not all(isinstance(value, Param) for value in linear.inputs[1:]):
        return None
    count = 1 if split is None else int(split.attr("heads"))
    for index, node in enumerate(sorted(slices, key=lambda user: user.attr("start"))):
        at = Site(site.graph, node)
        rows = (node.attr("start"), node.attr("stop"))
        params = [value for value in linear.inputs[1:] if isinstance(value, Param)]
        weights = [part(site.graph, param, index, _rows(param.expr, count, *rows)) for param in params]
        projected = site.graph.op("linear", [linear.input(0), *weights], scope=linear.scope, before=node)
        site.graph.replace(node.output, projected if split is None else at.op("split_heads", projected, heads=count))
    return None


def _rows(expr: Expr, heads: int, start: int, stop: int) -> Expr:
    """Rows [start, stop) of every head's block of rows."""
    if heads == 1:
        return slice(expr, 0, start, stop)
    total, *rest = expr.shape
    blocks = slice(reshape(expr, (heads, total // heads, *rest)), 1, start, stop)
    return reshape(blocks, (heads * (stop - start), *rest))


# --- latent attention ----------------------------------------------------------------------------------------


def latent(site: Site) -> Value | None:
    """Keys and values expanded from one latent, with a rotated key that all heads share."""
    node = site.node
    plain = len(node.inputs) <= 4
    joined, taken = made_by(node.input(1), "concat"), last_axis_slice(node.input(2))
    if plain and joined is None:
        return _fully_rotated_latent(site)
    if not plain or joined is None or taken is None or len(joined.inputs) != 2:
        return None
    unrotated, shared = last_axis_slice(joined.input(0)), made_by(joined.input(1), "expand")
    heads = made_by(taken[0], "split_heads")
    up = None if heads is None else made_by(heads.input(0), "linear")
    if unrotated is None or shared is None or up is None or unrotated[0] is not taken[0] or len(up.inputs) != 2:
        return None
    key, width = shared.input(0), taken[0].shape[-1]
    whole = (unrotated[1], unrotated[3], taken[1:]) == (0, 1, (unrotated[2], width, 1))
    return _latent_attention(site, key, up) if whole and key.shape[1] == 1 else None


def _fully_rotated_latent(site: Site) -> Value | None:
    """Latent attention whose keys have no unrotated part: every head has the shared key, and only values expand."""
    shared, heads = made_by(site.node.input(1), "expand"), made_by(site.node.input(2), "split_heads")
    up = None if heads is None else made_by(heads.input(0), "linear")
    if shared is None or up is None or shared.input(0).shape[1] != 1 or len(up.inputs) != 2:
        return None
    return _latent_attention(site, shared.input(0), up) if made_by(up.input(0), "rms_norm") is not None else None


def _latent_attention(site: Site, key: Value, up: Node) -> Value:
    """``key`` [B, 1, T, R] is shared by all heads, ``up`` expands the latent."""
    node = site.node
    rotary = site.op("reshape", key, shape=(key.shape[0], *key.shape[2:]))
    inputs = [node.input(0), up.input(0), rotary, up.input(1), node.optional_input(3)]
    return site.op("latent_attention", *inputs, **node.attrs)


RULES: dict[str, tuple[Rule, ...]] = {
    "transpose": (split, norm_of_heads),
    "reshape": (merge,),
    "rope": (single_head,),
    "split_heads": (scaled_heads,),
    "matmul": (transposed_weight,),
    "add": (bias_of_linear,),
    "mul": (unfuse_gate,),
    "attention": (no_bias, scaled_query, latent, unfuse_attention),
}
