"""What a truncating conversion needs to know of an attention: its heads before they are rotated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.ir.facts import AttentionSite
from compiler.ir.graph import Node, Param, Value
from passes.gqa_to_mla.sites import Projection, projection


@dataclass(frozen=True)
class Source:
    """An attention and its heads before rotation: ``query`` [B, H, T, d], ``key`` [B, g, T, d], ``value`` [B, g, T, v].

    ``pairs`` rotary pairs stand first in a head of d numbers, ``interleaved`` or in halves; 0 without rotary embedding.
    ``projections`` of queries, keys and values are given where all three are rows of linear maps of one input, and
    None where something else, such as a norm of the heads, stands between.
    """

    site: AttentionSite
    query: Value
    key: Value
    value: Value
    table: Node | None
    pairs: int
    interleaved: bool
    projections: tuple[Projection, Projection, Projection] | None

    @property
    def heads(self) -> int:
        return self.site.heads

    @property
    def groups(self) -> int:
        return self.site.groups

    @property
    def head_dim(self) -> int:
        return self.site.head_dim

    @property
    def value_dim(self) -> int:
        return self.site.value_dim

    @property
    def unrotated(self) -> int:
        return self.head_dim - 2 * self.pairs

    @property
    def gain(self) -> float:
        """The square of the rotary table's scale, by which a score of rotated numbers is multiplied."""
        return float(self.table.attr("scale")) ** 2 if self.table is not None else 1.0

    @property
    def cached(self) -> int:
        """Values that the original caches per token."""
        return self.groups * (self.head_dim + self.value_dim)

    @property
    def group_of(self) -> list[int]:
        """The key/value head of every query head."""
        return [head * self.groups // self.heads for head in range(self.heads)]

    @property
    def output(self) -> Node:
        assert self.site.output is not None  # `compressible` has checked
        return self.site.output

    @property
    def output_weight(self) -> Param:
        weight = self.output.input(1)
        assert isinstance(weight, Param)  # `attention_sites` finds linear maps with weights of their own
        return weight

    @property
    def storage(self) -> torch.dtype:
        return self.output_weight.storage

    @property
    def frequencies(self) -> Param | None:
        """The rotary frequencies [pairs]."""
        source = self.table.input(1) if self.table is not None else None
        assert source is None or isinstance(source, Param)  # `compressible` has checked
        return source

    @property
    def plain(self) -> bool:
        """Whether a published latent attention can hold it: linear heads, no window, no cap on its scores."""
        return self.projections is not None and not self.site.window and not self.site.softcap


def compressible(site: AttentionSite) -> Source | str:
    """The heads of an attention whose cache a latent can replace, or the reason why none can."""
    reason = _reason(site)
    if reason:
        return reason
    query, query_rope = _before_rope(site.node.input(0))
    key, key_rope = _before_rope(site.node.input(1))
    rotation = _rotation(query_rope, key_rope)
    if isinstance(rotation, str):
        return rotation
    pairs = int(rotation.input(1).shape[-1]) if rotation is not None else 0
    return Source(
        site,
        query,
        key,
        site.node.input(2),
        rotation.input(1).node if rotation is not None else None,
        pairs,
        rotation is not None and rotation.attr("layout") != "half",
        _projections(site),
    )


def _reason(site: AttentionSite) -> str:
    if not site.causal:
        return "it is not causal"
    if site.mask is not None or site.bias is not None:
        return "it adds a mask or a bias of its own to its scores"
    if site.sinks is not None:
        return "it has attention sinks"
    if any(
        user.op is site.node.op for part in site.node.inputs[1:3] if part for user in part.users.keys() - {site.node}
    ):
        return "it shares its keys or values with another attention, which would each have a cache of its own"
    return "" if site.output is not None else "its output is not read by one linear map"


def _before_rope(value: Value) -> tuple[Value, Node | None]:
    node = value.node
    if node is not None and node.op.name == "rope":
        return node.input(0), node
    return value, None


def _rotation(query: Node | None, key: Node | None) -> Node | str | None:
    """The rotation of queries and keys alike, None when there is none, or what is wrong with it."""
    if query is None and key is None:
        return None
    if query is None or key is None or query.inputs[1:] != key.inputs[1:] or query.attrs != key.attrs:
        return "it rotates queries and keys differently"
    table = query.input(1).node
    if table is None or table.op.name != "rope_table" or not isinstance(table.input(1), Param):
        return "its rotary frequencies are not constants"
    return query


def _projections(site: AttentionSite) -> tuple[Projection, Projection, Projection] | None:
    query, key, value = (projection(site.node.input(index)) for index in range(3))
    if isinstance(query, str) or isinstance(key, str) or isinstance(value, str):
        return None
    same = len({part.linear.input(0) for part in (query, key, value)}) == 1
    return (query, key, value) if same else None


def pair_rows(source: Source) -> tuple[Tensor, Tensor]:
    """Where a head has the real and the imaginary numbers of its pairs, int64 [pairs] each."""
    pairs = torch.arange(source.pairs)
    return (2 * pairs, 2 * pairs + 1) if source.interleaved else (pairs, pairs + source.pairs)
