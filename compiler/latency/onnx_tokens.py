"""Operations by which tokens go, as the ONNX backend lowers them where no sample is padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from compiler.latency.task import Task

END = torch.iinfo(torch.int64).max
TINY, HIGH = 1e-12, 1e30
INT64, FLOAT = 7, 1  # numbers of types in ONNX


class Build(Protocol):
    """A model in the making."""

    def op(self, name: str, *inputs: str, **attrs: object) -> str: ...
    def topk(self, x: str, count: int, **attrs: object) -> tuple[str, str]: ...
    def constant(self, tensor: torch.Tensor) -> str: ...


def _ints(build: Build, *numbers: int) -> str:
    return build.constant(torch.tensor(numbers))


def _shape(task: Task, place: int) -> tuple[int, ...]:
    type = task.operands[place]
    assert type is not None  # it is not optional
    return type.static_shape


def _scores(build: Build, task: Task, names: list[str]) -> str:
    attrs, (batch, heads, count, width) = task.op.all_attrs(task.attrs), _shape(task, 0)
    groups, depth = _shape(task, 1)[1:3]
    start, stop, step = {"first": (0, 1, 1), "last": (-1, END, 1)}.get(attrs["rows"], (0, END, attrs["step"]))
    query = build.op("Slice", names[0], *(_ints(build, number) for number in (start, stop, 2, step)))
    rows = count if attrs["rows"] == "all" else 1
    grouped = build.op("Reshape", query, _ints(build, batch, groups, -1, width))
    scores = build.op("MatMul", grouped, build.op("Transpose", names[1], perm=[0, 1, 3, 2]))
    scores = build.op("Mul", scores, build.constant(torch.tensor(attrs["scale"])))
    scores = build.op("Reshape", scores, _ints(build, batch, heads, -1, depth))
    if attrs["causal"] and attrs["rows"] == "all":
        seen = torch.ones(rows, depth, dtype=torch.bool).tril()[:: attrs["step"]]
        scores = build.op("Add", scores, build.constant(torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))))
    return build.op("ReduceMean", build.op("Softmax", scores, axis=-1), _ints(build, 1, 2), keepdims=0)


def _blocks(build: Build, task: Task, names: list[str]) -> str:
    (_, tokens), size = _shape(task, 0), task.attrs["size"]
    inside = torch.eye(-(-tokens // size)).repeat_interleave(size, 0)[:tokens]
    means = build.op("MatMul", names[0], build.constant((inside / inside.sum(0)).contiguous()))
    return build.op("MatMul", means, build.constant(inside.T.contiguous()))


def _select(build: Build, task: Task, names: list[str]) -> str:
    attrs, keep, tokens = task.op.all_attrs(task.attrs), task.attrs["keep"], _shape(task, 0)[1]
    ends = torch.zeros(tokens)
    ends[: attrs["prefix"]], ends[tokens - attrs["suffix"] :] = HIGH, 2 * HIGH
    scores = build.op("Add", names[0], build.constant(ends))
    index, _ = build.topk(build.topk(scores, keep)[1], keep, largest=0)
    return build.op("Cast", index, to=FLOAT)


def _match(build: Build, task: Task, names: list[str]) -> str:
    attrs, (batch, tokens, _) = task.op.all_attrs(task.attrs), _shape(task, 0)
    norm = build.op("ReduceL2", names[0], _ints(build, 2), keepdims=1)
    unit = build.op("Div", names[0], build.op("Max", norm, build.constant(torch.tensor(TINY))))
    stop = tokens - attrs["suffix"]
    targets, sources = (
        build.op("Slice", unit, *(_ints(build, number) for number in (attrs["prefix"] + first, stop, 1, 2)))
        for first in (0, 1)
    )
    near = build.op("MatMul", sources, build.op("Transpose", targets, perm=[0, 2, 1]))
    best = build.op("Squeeze", build.topk(near, 1)[0], _ints(build, 2))
    source = build.op("Mul", build.topk(best, tokens - attrs["keep"])[1], _ints(build, 2))
    rest = build.op("Add", source, _ints(build, attrs["prefix"] + 1))
    every = build.constant(torch.ones(batch, tokens, dtype=torch.int64))
    gone = build.constant(torch.zeros(batch, tokens - attrs["keep"], dtype=torch.int64))
    remains = build.op("ScatterElements", every, rest, gone, axis=1)
    return build.op("Cast", build.topk(remains, attrs["keep"])[1], to=FLOAT)


def _rows(build: Build, x: str, index: str) -> str:
    return build.op("GatherND", x, build.op("Unsqueeze", index, _ints(build, 2)), batch_dims=1)


def _take(build: Build, task: Task, names: list[str]) -> str:
    shape, (batch, _) = _shape(task, 0), _shape(task, 1)
    axis = task.op.all_attrs(task.attrs)["axis"] % len(shape)
    x = names[0] if shape[0] == batch else build.op("Expand", names[0], _ints(build, batch, *shape[1:]))
    perm = [0, axis, *(other for other in range(1, len(shape)) if other != axis)]
    if axis == 1:
        return _rows(build, x, names[1])
    taken = _rows(build, build.op("Transpose", x, perm=perm), names[1])
    return build.op("Transpose", taken, perm=[perm.index(other) for other in range(len(shape))])


def _merge(build: Build, task: Task, names: list[str]) -> str:
    x, weight, index, rest = names[:4]
    last, ahead = _ints(build, 2), _ints(build, 1)
    shares = build.op("Unsqueeze", _rows(build, weight, rest), ahead)
    kept = build.op("Unsqueeze", _rows(build, weight, index), last)
    into = names[4] if len(names) > 4 else ""
    if into:
        slots = build.constant(torch.arange(_shape(task, 2)[1])[None, :, None])
        met = build.op("Cast", build.op("Equal", slots, build.op("Unsqueeze", into, ahead)), to=FLOAT)
        shares = build.op("Mul", met, shares)
    added = build.op("MatMul", shares, _rows(build, x, rest))
    own, more = build.op("Mul", _rows(build, x, index), kept), build.op("ReduceSum", shares, last, keepdims=1)
    if into:
        return build.op("Div", build.op("Add", own, added), build.op("Add", kept, more))
    return build.op("Div", build.op("Concat", own, added, axis=1), build.op("Concat", kept, more, axis=1))


def _restore(build: Build, task: Task, names: list[str]) -> str:
    (batch, tokens, _), (_, count) = _shape(task, 0), _shape(task, 2)
    own = build.constant((torch.arange(tokens) + _shape(task, 1)[1]).expand(batch, tokens).contiguous())
    slots = build.constant(torch.arange(count).expand(batch, count).contiguous())
    place = build.op("ScatterElements", own, names[2], slots, axis=1)
    if len(names) > 4 and names[3]:
        place = build.op("ScatterElements", place, names[3], names[4], axis=1)
    return _rows(build, build.op("Concat", names[1], names[0], axis=1), place)


TOKENS: Mapping[str, Callable[[Build, Task, list[str]], str]] = {
    "token_scores": _scores,
    "token_blocks": _blocks,
    "token_select": _select,
    "token_match": _match,
    "token_take": _take,
    "token_merge": _merge,
    "token_restore": _restore,
}
