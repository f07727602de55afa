"""The calls of kernels that a generated module makes, on tensors without data: what binaries are made for.

Linear maps are called with any number of tokens; attention by kernels decodes one token of each sequence. Numbers of
tokens, sequences and cached keys are those at which launches begin to differ, not all that there can be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backends.kernels import codebook_linear, low_rank_linear, packed_linear
from backends.kernels.decoding import LEAST_KEYS, row_bytes
from backends.kernels.splits import PROGRAMS
from backends.torch_module.layout import Layout
from backends.torch_module.packing import (
    AnyScheme,
    ExpertsScheme,
    FloatScheme,
    Scheme,
    ShiftedScheme,
    StackScheme,
    TableScheme,
    scheme_of,
)
from compiler.ir.graph import Graph, Node, Param, Value

BATCHES = (1, 2, 4, 8, 16, 32, 64)
RESIDUES = 16
"""Whether a number is divisible by so many is what launches are compiled for."""
MULTIPROCESSORS = 304
"""Of the largest GPU that there are binaries for: on it sums are split up to the most tokens."""
LONGEST = 1 << 17
"""Keys where the config gives no limit."""


class KernelCall(NamedTuple):
    """A call of the operation in the file ``kernel``. The tensors among ``inputs`` are on the meta device."""

    kernel: str
    inputs: tuple[Any, ...]


class Reach(NamedTuple):
    """The dtype that the model computes in, the bits of what it caches (0: all of them), and its longest context."""

    dtype: torch.dtype
    bits: int
    keys: int


def calls_of(graph: Graph, layout: Layout, reach: Reach) -> Iterator[KernelCall]:
    """The calls of the module that ``graph`` makes in this ``layout``, each once for layers of equal sizes."""
    seen = set[tuple[Any, ...]]()
    for node in graph.nodes:
        for kind, *sizes in _kinds(node, layout, reach):
            if (kind, *sizes) not in seen:
                seen.add((kind, *sizes))
                yield from CALLS[kind](reach, *sizes)


def longest(config: Any) -> int:
    """How many keys a config allows."""
    found = (config or {}).get("max_position_embeddings")
    return found if isinstance(found, int) else LONGEST


def _kinds(node: Node, layout: Layout, reach: Reach) -> Iterator[tuple[Any, ...]]:
    """What of CALLS the operation does, and the sizes it does it with."""
    name = node.op.name
    if name == "linear":
        kind, scheme = _kind(node.input(1), "linear")
        if kind:
            yield kind, node.input(1).type.shape, scheme
        elif (factors := _factors(node, layout)) is not None:
            yield "pair", *factors, node.optional_input(2) is not None
    elif name == "experts":
        for value in node.inputs[3:5]:
            kind, scheme = _kind(value, "experts")
            if isinstance(scheme, ExpertsScheme) and value is not None:
                for bits, count in sorted(Counter(scheme.widths).items()):
                    yield kind, (count, *value.type.shape[1:]), Scheme(bits, scheme.group_size, scheme.zero_points)
            elif kind and value is not None:
                yield kind, value.type.shape, scheme
    elif name == "latent_attention":
        kind, scheme = _kind(node.input(3), "dense")
        if kind == "dense":
            yield kind, node.input(3).type.shape, scheme
        rotary = node.optional_input(2)
        sizes = (*node.input(0).shape[1::2], node.input(1).shape[-1], rotary.shape[-1] if rotary is not None else 0)
        yield "latent", *sizes, _near(node, reach), *_scores(node)
    elif name == "attention" and node.attr("causal") and reach.bits:
        heads, width = node.input(0).shape[1], node.input(0).shape[-1]
        if node.input(2).shape[-1] == width:
            sinks = node.optional_input(5) is not None
            yield "keys", heads, node.input(1).shape[1], width, _near(node, reach), *_scores(node), sinks


def _kind(value: Value | None, integers: str) -> tuple[str, AnyScheme | None]:
    """What is called for a weight, and how it is packed: ``integers``, "tables" for one table a row, or nothing, "".

    No kernel multiplies by weights with several tables a row, small floats or blocks: they are written out.
    """
    scheme = scheme_of(value) if isinstance(value, Param) else None
    if value is None or scheme is None or isinstance(scheme, StackScheme | FloatScheme):
        return "", None
    if isinstance(scheme, TableScheme):
        return "tables" if scheme.group_size in (0, value.shape[-1]) else "", scheme
    return integers, Scheme(*scheme, False) if isinstance(scheme, ShiftedScheme) else scheme


def _near(node: Node, reach: Reach) -> int:
    """How many keys a cache holds for the operation."""
    return min(node.attr("window") or reach.keys, reach.keys)


def _scores(node: Node) -> tuple[float, float | None]:
    return node.attr("scale"), node.attr("softcap") or None


def _factors(node: Node, layout: Layout) -> tuple[Any, Any] | None:
    """The shapes of the factors of a linear map whose weight is a product; None for any other.

    One call multiplies by both where both are linear maps of one module with weights that are not packed.
    """
    first = node.input(0).node
    if first is None or first.op.name != "linear" or first.optional_input(2) is not None or len(first.output.users) > 1:
        return None
    down, up = (layout.leaves.get(each) for each in (first, node))
    if down is None or up is None or down.container != up.container:
        return None
    factors = [leaf.weights["weight"] for leaf in (down, up)]
    return None if any(each in layout.schemes for each in factors) else (factors[0].type.shape, factors[1].type.shape)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _parts(shape: Any, scheme: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words, scales and zero points of a matrix, or of a stack of them."""
    *stack, rows, columns = shape
    groups = columns // scheme.group_size if scheme.group_size else 1
    words = _meta(*stack, rows, -(-columns * scheme.bits // 32), dtype=torch.int32)
    scales = _meta(*stack, rows, groups, dtype=dtype)
    zeros = _meta(*stack, -(-rows * scheme.bits // 32), groups, dtype=torch.int32) if scheme.zero_points else None
    return words, scales, zeros


def _tokens() -> range:
    """Numbers of tokens of packed maps: every one up to where all are the same."""
    return range(1, max(most for most in packed_linear.TILES if most < 1 << 30) + 2)


def _linear(reach: Reach, shape: Any, scheme: Any) -> Iterator[KernelCall]:
    words, scales, zeros = _parts(shape, scheme, reach.dtype)
    for tokens in _tokens():
        x = _meta(tokens, shape[-1], dtype=reach.dtype)
        yield KernelCall("packed_linear", (x, words, scales, zeros, scheme.bits))


def _experts(reach: Reach, shape: Any, scheme: Any) -> Iterator[KernelCall]:
    """Where an expert's part of the stack begins says how its addresses are divisible, again after RESIDUES."""
    words, scales, zeros = _parts(shape, scheme, reach.dtype)
    for expert, tokens in product(range(min(shape[0], RESIDUES)), _tokens()):
        x = _meta(tokens, shape[-1], dtype=reach.dtype)
        mine = None if zeros is None else zeros[expert]
        yield KernelCall("packed_linear", (x, words[expert], scales[expert], mine, scheme.bits))


def _tables(reach: Reach, shape: Any, scheme: Any) -> Iterator[KernelCall]:
    """The matrix, or each of a stack: what its launches read is made of it, and lies at the same kind of addresses."""
    rows, columns = shape[-2:]
    words, table = (
        _meta(rows, -(-columns * scheme.bits // 32), dtype=torch.int32),
        _meta(rows, 1, scheme.numbers, dtype=reach.dtype),
    )
    for tokens in _table_tokens(rows, columns):
        yield KernelCall("table_linear", (_meta(tokens, columns, dtype=reach.dtype), words, table, scheme.bits))


def _table_tokens(rows: int, columns: int) -> Iterator[int]:
    """Numbers of tokens of maps with tables: each of few, then, for every number of blocks up to where sums are not
    split, one for each power of two that launches are compiled for."""
    *few, most = codebook_linear.TILES
    tile = codebook_linear.TILES[most]
    yield from range(1, few[-1] + 1)
    split = PROGRAMS * MULTIPROCESSORS // (2 * -(-rows // tile.rows)) if columns > tile.width else 0
    for blocks in range(1, split + 2):
        yield from (blocks * tile.tokens - less for less in (0, 1, 2, 4, 8))


def _dense(reach: Reach, shape: Any, scheme: Any) -> Iterator[KernelCall]:
    yield KernelCall("packed_dense", (*_parts(shape, scheme, reach.dtype), scheme.bits, shape[-1]))


def _pair(reach: Reach, down: Any, up: Any, bias: bool) -> Iterator[KernelCall]:
    factors = [_meta(*shape, dtype=reach.dtype) for shape in (down, up)]
    added = _meta(up[0], dtype=reach.dtype) if bias else None
    for tokens in range(1, low_rank_linear.MOST_TOKENS + 1):
        yield KernelCall("low_rank_linear", (_meta(tokens, down[-1], dtype=reach.dtype), *factors, added))


def _contexts(reach: Reach, most: int) -> Iterator[tuple[int, int, Tensor | None]]:
    """Sequences, keys, and masks: none, one for all sequences, and one for each."""
    splits = (LEAST_KEYS, 2 * LEAST_KEYS, 16 * LEAST_KEYS)
    starts = {start for start in (1, *splits, 1 << 14, most - RESIDUES) if 0 < start <= most}
    keys = sorted({key for start in starts for key in range(start, start + RESIDUES) if key <= most})
    for batch, length in product(BATCHES, keys):
        yield batch, length, None
        for several in {1, batch}:
            yield batch, length, _meta(several, 1, 1, length, dtype=torch.bool)


def _latent(
    reach: Reach, heads: int, width: int, rank: int, rotary: int, most: int, scale: float, softcap: float | None
) -> Iterator[KernelCall]:
    """Queries lie as the products that generated code makes them by leave them."""
    dtype, size = (torch.uint8, partial(row_bytes, bits=reach.bits)) if reach.bits else (reach.dtype, int)
    key_up, turn = _meta(heads, width - rotary, rank, dtype=reach.dtype), _meta(rank, rank, dtype=reach.dtype)
    for batch, keys, mask in _contexts(reach, most):
        query = _meta(batch, heads, 1, width, dtype=reach.dtype)
        absorbed = torch.einsum("bhtn,hnr->bhtr", query[..., : width - rotary], key_up)
        absorbed = absorbed @ turn if reach.bits else absorbed
        turned = query[..., width - rotary :].transpose(1, 2) if rotary else None
        latents = _meta(batch, keys, size(rank), dtype=dtype)
        rotary_keys = _meta(batch, keys, size(rotary), dtype=dtype) if rotary else None
        given = (scale, mask, None, None, None, softcap, reach.bits or 16)
        yield KernelCall("latent_decode", (absorbed.transpose(1, 2), turned, latents, rotary_keys, *given))


def _keys(
    reach: Reach, heads: int, groups: int, size: int, most: int, scale: float, softcap: float | None, sinks: bool
) -> Iterator[KernelCall]:
    for batch, keys, mask in _contexts(reach, most):
        query = _meta(batch, heads, 1, size, dtype=reach.dtype).transpose(1, 2)
        caches = [_meta(batch, groups, keys, row_bytes(size, reach.bits), dtype=torch.uint8) for _ in range(2)]
        logits = _meta(heads, dtype=reach.dtype) if sinks else None
        yield KernelCall("cached_decode", (query, *caches, scale, mask, None, None, softcap, logits, reach.bits))


CALLS: dict[str, Any] = {
    "linear": _linear,
    "experts": _experts,
    "tables": _tables,
    "dense": _dense,
    "pair": _pair,
    "latent": _latent,
    "keys": _keys,
}
"""What yields the calls, by what is called."""
