"""Measuring tasks: all in turns, many times, the median of each."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from compiler.errors import CompressError, PassError
from compiler.ir.types import TensorType
from compiler.latency.table import Measure, Workload
from compiler.latency.task import Task

ROUNDS = 41
LEAST_ROUNDS = 9
SECONDS = 60.0
"""A group of tasks is measured in ``ROUNDS`` turns, in fewer when these take longer than ``SECONDS``."""
WARM = 3
GROUP = 512 << 20
"""Bytes of weights that are held at once. They do not fit into caches: as in a model, a task finds its own cold."""

Runner = Callable[[], object]
Clock = Callable[[], float]


def measuring(workload: Workload) -> Measure:
    """What measures tasks in the runtime of ``workload``. Raises PassError when that is not installed."""
    if workload.runtime == "torch":
        return partial(_in_torch, workload.threads)
    from compiler.latency.onnx import needs_onnx

    needs_onnx()
    return partial(_in_onnxruntime, workload.threads)


def _in_torch(threads: int, tasks: Sequence[Task]) -> list[float]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            groups = ([_started(task, _torch_runner) for task in group] for group in _groups(tasks))
            return [seconds for group in groups for seconds in in_turns(group, _clock(threads))]
    finally:
        torch.set_num_threads(before)


def _torch_runner(task: Task) -> Runner:
    operands = [None if type is None else sample(type) for type in task.operands]
    operands += [None] * (len(task.op.operands.split()) - len(operands))
    return partial(task.op.eval, *operands, **task.op.all_attrs(task.attrs))


def _in_onnxruntime(threads: int, tasks: Sequence[Task]) -> list[float]:
    from compiler.latency.onnx import idle, runner

    found: list[float] = []
    for group in _groups(tasks):
        runners = [_started(task, partial(runner, threads=threads)) for task in group]
        nothing, *own = in_turns([idle(threads), *runners], _clock(threads))
        found += [max(seconds - nothing, 0.0) for seconds in own]
    return found


def _started(task: Task, make: Callable[[Task], Runner]) -> Runner:
    """What runs ``task``, after it has run once. Raises PassError, naming the task, when the runtime cannot."""
    try:
        found = make(task)
        found()
    except CompressError:
        raise
    except Exception as reason:  # every runtime has classes of its own
        raise PassError(
            f"the runtime cannot run {task}: {reason}",
            option="runtime",
            remedy="write another `runtime`, or bring a table with `latency: table.json`",
        ) from reason
    return found


def _groups(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    group: list[Task] = []
    for task in tasks:
        if group and sum(held.nbytes for held in group) + task.nbytes > GROUP:
            yield group
            group = []
        group.append(task)
    yield group


def _clock(threads: int) -> Clock:
    """Of a single thread its own time, in which nobody else runs."""
    return time.thread_time if threads == 1 else time.perf_counter


def in_turns(runners: Sequence[Runner], clock: Clock = time.perf_counter) -> list[float]:
    """The median seconds of each of ``runners``, which run one after the other in an order that changes."""
    order = list(range(len(runners)))
    shuffled = random.Random(0)
    times: list[list[float]] = [[] for _ in runners]
    for _ in range(WARM):
        for runner in runners:
            runner()
    started = time.perf_counter()
    for turn in range(ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() - started > SECONDS:
            break
        shuffled.shuffle(order)
        for index in order:
            before = clock()
            runners[index]()
            times[index].append(clock() - before)
    return [median(own) for own in times]


def sample(type: TensorType) -> Tensor:
    """A tensor of ``type``: positive numbers, as roots may be taken of them; zeros where they are integers; True."""
    shape = type.static_shape
    if type.dtype.is_floating_point:
        return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=type.dtype) + 0.1
    return torch.ones(shape, dtype=type.dtype) if type.dtype == torch.bool else torch.zeros(shape, dtype=type.dtype)
