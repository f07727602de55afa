"""A linear map of low rank, for few tokens: both factors in one launch.

    hidden = x · downᵀ;   y = hidden · upᵀ + bias

Bytes moved: down [R, K] and up [N, R] once; x, hidden and y are small and stay in the second-level cache. Three
designs:

    "grid"      one cooperative launch. Blocks of rows of down, split over K, are shared out to all programs, and the
                last program at a block adds the sums up; a barrier of the grid; blocks of rows of up are shared out.
                While a program works on down it already asks for its rows of up: device memory never rests.
    "slices"    a program takes a slice of R and some rows of up, and computes its slice of hidden itself: down is read
                from the cache many times. Slices of R are summed by a second, small launch; one slice needs none.
    "launches"  the two halves of "grid" one after the other.
"""

# pyright: basic, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .launch import INTERPRETED, Launch, Plan, ceil_div, first_reason, gpu_of, jit, operation, power_of_two, tl

MOST_TOKENS = 16
SECTOR = 32  # bytes: the least that memory delivers
LEAST = 16  # rows of a block of up: narrower ones make narrower loads
COMBINED = 1024  # results that one program of the combining launch sums


class Tile(NamedTuple):
    """``rows`` of down by ``depth`` of K are a block of the first half, of the second it is at most ``outputs`` of N by
    ``width`` of R.

    ``programs`` run on a processor, ``warps`` each. In "slices" ``rows`` is the slice of R, ``width`` means nothing.
    ``ahead`` sectors of up at most are asked for before the barrier of "grid".
    """

    design: str
    rows: int
    depth: int
    outputs: int
    width: int
    programs: int
    warps: int
    stages: int = 3
    ahead: int = 0


# Most bytes of weights -> the tile for one token, the tile for several.
TILES = {
    1 << 19: (Tile("launches", 2, 2048, 16, 64, 4, 4), Tile("grid", 16, 128, 128, 64, 1, 8, ahead=4096)),
    1 << 62: (Tile("grid", 2, 2048, 64, 64, 2, 4, ahead=2048), Tile("launches", 16, 128, 16, 128, 4, 4)),
}


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
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """[TOKENS, ROWS]: rows of x times rows of w, over columns ``first`` to ``last``."""
    token = tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    lines = w + row.to(tl.int64)[:, None] * width
    total = tl.zeros([ROWS, BLOCK] if TOKENS == 1 else [TOKENS, ROWS], tl.float32)
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        here = start + column
        weight = tl.load(lines + here, mask=inside[:, None] & (here < last), other=0.0)
        value = tl.load(x + token * width + here, mask=(token < tokens) & (here < last), other=0.0)
        if TOKENS == 1:
            total += value.to(tl.float32) * weight.to(tl.float32)
        else:
            if WIDE:
                value, weight = value.to(tl.float32), weight.to(tl.float32)
            total = tl.dot(value, tl.trans(weight), total, input_precision="ieee")
    return tl.expand_dims(tl.sum(total, 1), 0) if TOKENS == 1 else total


@jit
def _write(y, bias, total, tokens, row, inside, n, BIAS: tl.constexpr, TOKENS: tl.constexpr):
    token = tl.arange(0, TOKENS)[:, None]
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = token.to(tl.int64) * n + row[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(token < tokens) & inside[None, :])


@jit
def _add_up(parts, hidden, counter, tokens, row, inside, r, PIECES: tl.constexpr, TOKENS: tl.constexpr):
    """The last program to arrive here adds the pieces of its rows of hidden, always in the same order."""
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == PIECES - 1:
        token = tl.arange(0, TOKENS)[:, None]
        place = token * r + row[None, :]
        here = (token < tokens) & inside[None, :]
        total = tl.load(parts + place, mask=here, other=0.0)
        for piece in tl.static_range(1, PIECES):
            total += tl.load(parts + piece * tokens * r + place, mask=here, other=0.0)
        tl.store(hidden + place, total.to(hidden.dtype.element_ty), mask=here)
        tl.store(counter, 0)


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
    parts,
    hidden,
    y,
    counters,
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
    STAGES: tl.constexpr,
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
            total = _product(x, down, tokens, mine, inside, first, last, k, TOKENS, ROWS, DEPTH, STAGES, WIDE)
            part = parts + (unit % PIECES) * tokens * r
            _write(part, bias, total, tokens, mine, inside, r, False, TOKENS)
            if PIECES > 1:
                counter = counters + 1 + unit // PIECES
                _add_up(parts, hidden, counter, tokens, mine, inside, r, PIECES, TOKENS)
    if HALF == 0:
        _barrier(counters)
    if AHEAD:
        tl.store(waste + program, tl.sum(ahead.to(tl.float32)))
    if HALF != 1:
        row = tl.arange(0, OUTPUTS)
        for block in range(program, tl.cdiv(n, share), programs):
            mine = block * share + row
            inside = (row < share) & (mine < n)
            total = _product(hidden, up, tokens, mine, inside, 0, r, r, TOKENS, OUTPUTS, WIDTH, STAGES, WIDE)
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
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y, or without ``BIAS`` its sums over each of the slices of R: [slices, tokens, n]."""
    part = tl.program_id(0) % slices
    mine = part * ROWS + tl.arange(0, ROWS)
    kept = mine < r
    hidden = _product(x, down, tokens, mine, kept, 0, k, k, TOKENS, ROWS, DEPTH, STAGES, WIDE)
    start = tl.program_id(0) // slices * share
    end = tl.minimum(start + share, n)
    for first in range(start, end, OUTPUTS):
        row = first + tl.arange(0, OUTPUTS)
        inside = row < end
        lines = up + row.to(tl.int64)[:, None] * r + mine[None, :]
        weight = tl.load(lines, mask=inside[:, None] & kept[None, :], other=0.0)
        if TOKENS == 1:
            total = tl.expand_dims(tl.sum(hidden * weight.to(tl.float32), 1), 0)
        else:
            value = hidden.to(weight.dtype)
            if WIDE:
                value, weight = value.to(tl.float32), weight.to(tl.float32)
            total = tl.dot(value, tl.trans(weight), input_precision="ieee")
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


def plan(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, tile: Tile | None = None) -> Plan:
    """One launch or two, as the tile's design says. In the interpreter programs cannot wait for each other."""
    tile = tile or _tile(x, down, up)
    if tile.design == "grid" and (INTERPRETED or not gpu_of(x).waits):
        tile = tile._replace(design="launches")
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], up.shape[0])
    return Plan(y, (_slices if tile.design == "slices" else _halves)(x, down, up, bias, y, tile))


def _tile(x: Tensor, down: Tensor, up: Tensor) -> Tile:
    size = (down.numel() + up.numel()) * up.element_size()
    one, several = next(tiles for most, tiles in TILES.items() if size <= most)
    return several if x.numel() > x.shape[-1] else one


def _halves(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, y: Tensor, tile: Tile) -> list[Launch]:
    (r, k), n, tokens = down.shape, up.shape[0], x.numel() // x.shape[-1]
    programs = gpu_of(x).processors * tile.programs
    blocks = ceil_div(r, tile.rows)
    span = ceil_div(ceil_div(k, max(programs // blocks, 1)), tile.depth) * tile.depth
    pieces = ceil_div(k, span)
    rounds = ceil_div(ceil_div(n, tile.outputs), programs)
    share = ceil_div(n, rounds * programs)
    together = tile.design == "grid"
    hidden = x.new_empty(tokens, r)
    arguments = _common(x, down, up, bias) | {
        "parts": hidden if pieces == 1 else x.new_empty(pieces, tokens, r, dtype=torch.float32),
        "hidden": hidden,
        "y": y,
        "counters": _counters(x, 1 + programs),
        "waste": x.new_empty(programs, dtype=torch.float32) if together else hidden,
        "share": share,
    }
    stride = SECTOR // up.element_size()
    constants = {
        "SPAN": span,
        "PIECES": pieces,
        "ROWS": tile.rows,
        "DEPTH": tile.depth,
        "OUTPUTS": max(power_of_two(share), LEAST),
        "WIDTH": tile.width,
        "AHEAD": min(power_of_two(ceil_div(share * r, stride)), tile.ahead) if together else 0,
        "STRIDE": stride,
    } | _kind(tokens, bias, tile)
    grids = [(0, programs)] if together else [(1, blocks * pieces), (2, ceil_div(n, share))]
    options = {"launch_cooperative_grid": True} if together else {}
    return [
        Launch(_low_rank_linear, (grid,), arguments, constants | {"HALF": half}, tile.warps, tile.stages, options)
        for half, grid in grids
    ]


def _slices(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, y: Tensor, tile: Tile) -> list[Launch]:
    r, n, tokens = down.shape[0], up.shape[0], x.numel() // x.shape[-1]
    slices = ceil_div(r, tile.rows)
    share = ceil_div(n, max(gpu_of(x).processors * tile.programs // slices, 1))
    parts = y if slices == 1 else x.new_empty(slices, tokens, n, dtype=torch.float32)
    arguments = _common(x, down, up, bias) | {"y": parts, "share": share, "slices": slices}
    kind = _kind(tokens, bias, tile)
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


def _kind(tokens: int, bias: Tensor | None, tile: Tile) -> dict[str, Any]:
    """The constants of both kernels: several tokens go to the matrix units, which take 16."""
    wide = {"BIAS": bias is not None, "WIDE": INTERPRETED}
    return {"TOKENS": 1 if tokens <= 1 else MOST_TOKENS, "STAGES": tile.stages} | wide


def _counters(x: Tensor, count: int) -> Tensor:
    """Zeros, which every launch leaves as zeros or, for the barrier, fit for the next. Launches on one stream follow
    each other and share them; a captured graph, which may be replayed on any stream, has its own."""
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return x.new_zeros(count, dtype=torch.int32)
    return _lasting(x.device, torch.cuda.current_stream(x.device).cuda_stream, count)


@cache
def _lasting(device: torch.device, stream: int, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N], as ``reference`` says."""
    return reference(x, down, up, bias)


def _shaped(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], up.shape[0])


low_rank_linear = operation(low_rank_linear, reference, plan, outside, _shaped)
