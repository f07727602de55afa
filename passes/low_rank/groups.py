"""Which weights may share a first factor, and what they are together."""

from __future__ import annotations

from collections.abc import Sequence

from compiler.ir.layers import Layer, layer_of
from passes.low_rank.keys import Keys, scores_with
from passes.low_rank.places import Place
from passes.low_rank.shared import Adjacent
from passes.low_rank.tucker import Tucker
from passes.low_rank.values import Values, chain_with


def sharing(places: Sequence[Place], share: str) -> list[list[Place]]:
    """``places`` in groups that may share a first factor; one that shares none is alone.

    ``share``: `none`; `input`, linear maps of one use and one layer that read the same value; `layers`, such of the
    same name and shape in two layers that follow each other; `values`, value and output projections of one attention;
    `keys`, its query and key projections.
    """
    found: dict[object, list[Place]] = {}
    for place in places:
        found.setdefault(_shared(place, share) or place, []).append(place)
    return list(found.values())


def _shared(place: Place, share: str) -> object:
    """Equal for places that may share; None for one that shares with none."""
    if type(place) is not Place and not isinstance(place, Tucker):
        return None
    (param,) = place.params
    node = param.single_user()
    if share == "none" or node is None or node.op.name != "linear":
        return None
    layer = layer_of(param.name)
    if share == "input":
        return node.input(0), layer, place.width if isinstance(place, Tucker) else None
    if share == "values":
        return chain_with(param)
    if share == "keys":
        return scores_with(param)
    return layer and (Layer(layer.stack, layer.index // 2), param.name.removeprefix(layer.scope), param.type)


def together(group: Sequence[Place], share: str) -> Place:
    """The weights of ``group``, which `sharing` found for ``share``, as one place."""
    if len(group) == 1:
        return group[0]
    params = tuple(param for place in group for param in place.params)
    heads = tuple(heads for place in group if isinstance(place, Tucker) for heads in place.heads)
    if heads:
        return Tucker(params, heads, False)
    if share == "keys" and (scores := scores_with(params[0])) is not None:
        return Keys(params if params[0] is scores.key.input(1) else params[::-1])
    if share == "values" and (chain := chain_with(params[0])) is not None:
        return Values(params if params[0] is chain.value.input(1) else params[::-1])
    return Adjacent(params) if share == "layers" else Place(params)
