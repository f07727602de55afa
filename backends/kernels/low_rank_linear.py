"""A linear map of low rank, for few tokens: both factors in one launch.

    hidden = x · downᵀ;   y = hidden · upᵀ + bias

Bytes moved: down [R, K] and up [N, R] once; x, hidden and y are small and stay in the second-level cache. Three designs:

    "grid"      one cooperative launch. Blocks of rows of down, split over K, are shared out to all programs; a barrier of
                the grid; blocks of rows of up are shared out. While a program works on down it already asks for its
                rows of up, so that device memory never rests.
    "slices"    a program takes a slice of R and some rows of up, and computes its slice of hidden itself: down is read
                from the cache many times. Slices of R are summed by a second, small launch; one slice needs none.
    "launches"  the two halves of "grid" one after the other.
"""

# pyright: basic, reportOptionalMemberAccess=false
from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .launch import INTERPRETED, Launch, Plan, ceil_div, first_reason, jit, operation, power_of_two, processors, tl

MOST_TOKENS = 16
SECTOR = 32  # bytes: the least that memory delivers
COMBINED = 1024  # results that one program of the combining launch sums


class Tile(NamedTuple):
    """``rows`` of down and ``depth`` of K are a block of the first half, ``outputs`` of N and ``width`` of R of the second.

    ``programs`` run on a processor, ``warps`` each. In "slices" ``rows`` is the slice of R, and ``width`` means nothing.
    ``ahead`` sectors of up at most are asked for before the barrier of "grid".
    """

    design: str = "launches"
    rows: int = 8
    depth: int = 512
    outputs: int = 16
    width: int = 128
    programs: int = 2
    warps: int = 4
    stages: int = 3
    ahead: int = 0


def reference(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N] in x's dtype, of x [..., K], down [R, K], up [N, R] and bias [N]."""
    return functional.linear(functional.linear(x, down), up, bias)


@jit
def _product(
    x,
    w,
    tokens,
    row,
    inside,
    first,
    last,
    width,
    PIECES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """[TOKENS, ROWS]: over columns ``first`` to ``last``, the sums of products of x, in PIECES to add, and rows of w."""
    token = tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    lines = w + row.to(tl.int64)[:, None] * width
    total = tl.zeros([ROWS, BLOCK] if TOKENS == 1 else [TOKENS, ROWS], tl.float32)
    for start in range(first, last, BLOCK):
        here = start + column
        weight = tl.load(lines + here, mask=inside[:, None] & (here < last), other=0.0)
        there = (token < tokens) & (here < last)
        value = tl.load(x + token * width + here, mask=there, other=0.0).to(tl.float32)
        for piece in tl.static_range(1, PIECES):
            value += tl.load(x + (piece * tokens + token) * width + here, mask=there, other=0.0)
        if TOKENS == 1:
            total += value * weight.to(tl.float32)
        else:
            rounded = value.to(weight.dtype)
            if WIDE:
                rounded, weight = rounded.to(tl.float32), weight.to(tl.float32)
            total = tl.dot(rounded, tl.trans(weight), total, input_precision="ieee")
    return tl.sum(total, 1)[None, :] if TOKENS == 1 else total


@jit
def _write(y, bias, total, tokens, row, inside, n, BIAS: tl.constexpr, TOKENS: tl.constexpr):
    token = tl.arange(0, TOKENS)[:, None]
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = token.to(tl.int64) * n + row[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(token < tokens) & inside[None, :])


@jit
def _barrier(counter):
    """All programs of the grid arrive: together they add 2³¹, so that the sign changes once and nothing is reset."""
    tl.debug_barrier()
    others = tl.num_programs(0) - 1
    step = tl.where(tl.program_id(0) == 0, 2147483647 - (others - 1), 1)
    before = tl.atomic_add(counter, step, sem="acq_rel")
    while (tl.atomic_add(counter, 0, sem="acquire") ^ before) >= 0:
        pass
    tl.debug_barrier()


@jit
def _low_rank_linear(
    x,
    down,
    up,
    bias,
    hidden,
    y,
    counter,
    waste,
    tokens,
    k,
    r,
    n,
    share,
    HALF: tl.constexpr,
    SPAN: tl.constexpr,
    PIECES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    AHEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``HALF`` 1 or 2 of the work, or 0: both, in a cooperative launch. ``share`` rows of up are a block.

    Every STRIDE-th of AHEAD elements of up is loaded for nothing but to have it in the cache after the barrier.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    if AHEAD:
        place = program.to(tl.int64) * share * r + tl.arange(0, AHEAD) * STRIDE
        end = tl.minimum((program + 1) * share, n).to(tl.int64) * r
        ahead = tl.load(up + place, mask=place < end, other=0.0, volatile=True)
    if HALF != 2:
        row = tl.arange(0, ROWS)
        for unit in range(program, tl.cdiv(r, ROWS) * PIECES, programs):
            mine, first = unit // PIECES * ROWS + row, unit % PIECES * SPAN
            inside = mine < r
            last = tl.minimum(first + SPAN, k)
            total = _product(x, down, tokens, mine, inside, first, last, k, 1, TOKENS, ROWS, DEPTH, WIDE)
            piece = hidden + (unit % PIECES) * tokens * r
            _write(piece, bias, total, tokens, mine, inside, r, False, TOKENS)
    if HALF == 0:
        _barrier(counter)
    if AHEAD:
        tl.store(waste + program, tl.sum(ahead.to(tl.float32)))
    if HALF != 1:
        row = tl.arange(0, OUTPUTS)
        for block in range(program, tl.cdiv(n, share), programs):
            mine = block * share + row
            inside = (row < share) & (mine < n)
            total = _product(hidden, up, tokens, mine, inside, 0, r, r, PIECES, TOKENS, OUTPUTS, WIDTH, WIDE)
            _write(y, bias, total, tokens, mine, inside, n, BIAS, TOKENS)


@jit
def _sliced(
    x,
    down,
    up,
    bias,
    y,
    tokens,
    k,
    r,
    n,
    share,
    slices,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y, or without ``BIAS`` its sums over each of the slices of R: [slices, tokens, n]."""
    part = tl.program_id(0) % slices
    mine = part * ROWS + tl.arange(0, ROWS)
    kept = mine < r
    hidden = _product(x, down, tokens, mine, kept, 0, k, k, 1, TOKENS, ROWS, DEPTH, WIDE)
    start = tl.program_id(0) // slices * share
    end = tl.minimum(start + share, n)
    for first in range(start, end, OUTPUTS):
        row = first + tl.arange(0, OUTPUTS)
        inside = row < end
        lines = up + row.to(tl.int64)[:, None] * r + mine[None, :]
        weight = tl.load(lines, mask=inside[:, None] & kept[None, :], other=0.0)
        if TOKENS == 1:
            total = tl.sum(hidden * weight.to(tl.float32), 1)[None, :]
        else:
            rounded = hidden.to(weight.dtype)
            if WIDE:
                rounded, weight = rounded.to(tl.float32), weight.to(tl.float32)
            total = tl.dot(rounded, tl.trans(weight), input_precision="ieee")
        _write(y + part.to(tl.int64) * tokens * n, bias, total, tokens, row, inside, n, BIAS, TOKENS)


@jit
def _combined(parts, bias, y, count, n, SLICES: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.load(parts + place, mask=inside, other=0.0)
    for part in tl.static_range(1, SLICES):
        total += tl.load(parts + part * count + place, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + place % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


def outside(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> str | None:
    """Why the inputs are not for the kernel."""
    tokens = x.numel() // max(x.shape[-1], 1)
    others = [down, up] + ([] if bias is None else [bias])
    return first_reason(
        [
            (x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"{x.dtype} is no dtype of activations"),
            (all(value.dtype == x.dtype for value in others), "the weights have another dtype"),
            (all(value.is_contiguous() for value in (down, up)), "the weights are not contiguous"),
            (min(*down.shape, *up.shape) > 0, "there are no weights"),
            (tokens <= MOST_TOKENS, f"for {tokens} tokens two matrix products are faster"),
        ]
    )


def tile_for(x: Tensor, down: Tensor, up: Tensor) -> Tile:
    """The design and sizes for these shapes."""
    return Tile()


def plan(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, tile: Tile | None = None) -> Plan:
    """One launch or two, as the tile's design says. In the interpreter programs cannot wait for each other."""
    tile = tile or tile_for(x, down, up)
    if tile.design == "grid" and (INTERPRETED or torch.version.hip):
        tile = tile._replace(design="launches")
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], up.shape[0])
    return Plan(y, (_slices if tile.design == "slices" else _halves)(x, down, up, bias, y, tile))


def _halves(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, y: Tensor, tile: Tile) -> list[Launch]:
    (r, k), n, tokens = down.shape, up.shape[0], x.numel() // x.shape[-1]
    programs = processors(x) * tile.programs
    blocks = ceil_div(r, tile.rows)
    span = ceil_div(ceil_div(k, max(programs // blocks, 1)), tile.depth) * tile.depth
    pieces = ceil_div(k, span)
    rounds = ceil_div(ceil_div(n, tile.outputs), programs)
    share = ceil_div(n, rounds * programs)
    together = tile.design == "grid"
    hidden = x.new_empty(pieces, tokens, r, dtype=torch.float32)
    arguments = _common(x, down, up, bias) | {
        "hidden": hidden,
        "y": y,
        "counter": _counter(x) if together else hidden,
        "waste": x.new_empty(programs, dtype=torch.float32) if together else hidden,
        "share": share,
    }
    stride = SECTOR // up.element_size()
    constants = {
        "SPAN": span,
        "PIECES": pieces,
        "ROWS": tile.rows,
        "DEPTH": tile.depth,
        "OUTPUTS": tile.outputs,
        "WIDTH": tile.width,
        "AHEAD": min(power_of_two(ceil_div(share * r, stride)), tile.ahead) if together else 0,
        "STRIDE": stride,
    } | _kind(tokens, bias)
    grids = [(0, programs)] if together else [(1, blocks * pieces), (2, ceil_div(n, share))]
    options = {"launch_cooperative_grid": True} if together else {}
    return [
        Launch(_low_rank_linear, (grid,), arguments, constants | {"HALF": half}, tile.warps, tile.stages, options)
        for half, grid in grids
    ]


def _slices(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, y: Tensor, tile: Tile) -> list[Launch]:
    r, n, tokens = down.shape[0], up.shape[0], x.numel() // x.shape[-1]
    slices = ceil_div(r, tile.rows)
    share = ceil_div(n, max(processors(x) * tile.programs // slices, 1))
    parts = y if slices == 1 else x.new_empty(slices, tokens, n, dtype=torch.float32)
    arguments = _common(x, down, up, bias) | {"y": parts, "share": share, "slices": slices}
    kind = _kind(tokens, bias)
    constants = {"ROWS": tile.rows, "DEPTH": tile.depth, "OUTPUTS": tile.outputs} | kind
    constants["BIAS"] &= slices == 1
    grid = (ceil_div(n, share) * slices,)
    launch = Launch(_sliced, grid, arguments, constants, tile.warps, tile.stages)
    if slices == 1:
        return [launch]
    sums = {"parts": parts, "bias": arguments["bias"], "y": y, "count": y.numel(), "n": n}
    constants = {"SLICES": slices, "BIAS": kind["BIAS"], "BLOCK": COMBINED}
    return [launch, Launch(_combined, (ceil_div(y.numel(), COMBINED),), sums, constants)]


def _common(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> dict[str, Any]:
    """The arguments of both kernels."""
    (r, k), n = down.shape, up.shape[0]
    sizes = {"tokens": x.numel() // k, "k": k, "r": r, "n": n}
    return {"x": x, "down": down, "up": up, "bias": x if bias is None else bias} | sizes


def _kind(tokens: int, bias: Tensor | None) -> dict[str, Any]:
    """The constants of both kernels: several tokens go to the matrix units, which take 16."""
    return {"TOKENS": 1 if tokens <= 1 else MOST_TOKENS, "BIAS": bias is not None, "WIDE": INTERPRETED}


def _counter(x: Tensor) -> Tensor:
    """What the barrier counts in: launches on one stream follow each other and share it; a captured graph, which may
    be replayed on any stream, has its own."""
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return x.new_zeros(1, dtype=torch.int32)
    return _lasting(x.device, torch.cuda.current_stream(x.device).cuda_stream)


@cache
def _lasting(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N], as ``reference`` says."""
    return reference(x, down, up, bias)


def _shaped(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], up.shape[0])


low_rank_linear = operation(low_rank_linear, reference, plan, outside, _shaped)
