"""What a kernel file needs: Triton where it is installed, launches as data, and an operation of torch around both.

The files of this folder import torch and each other and nothing else, so that a checkpoint can carry them.
"""

# pyright: basic, reportOptionalMemberAccess=false
# Triton's language has no types that a checker could use.
from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .binary import BINARIES, FOR_ANY

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``, or the function itself where Triton is not installed: then only the path for CPUs runs."""
    return jit_for_any()(function)


def jit_for_any(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """``jit`` of a kernel that is not compiled anew for values of the arguments ``names``, as of lengths of caches."""

    def made(function: Callable[..., Any]) -> Any:
        function.__dict__[FOR_ANY] = names
        return triton.jit(do_not_specialize=names)(function) if triton is not None else function

    return made


@dataclass(frozen=True)
class Launch:
    """One launch of ``kernel`` by ``grid`` programs.

    ``arguments`` are tensors and numbers by the kernel's names of them, ``constants`` its compile-time constants,
    ``options`` further options of Triton's compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Launches it on the current stream, from a binary that comes with it or compiled by Triton, or runs it in the
        interpreter. A grid without programs does nothing."""
        if not all(self.grid) or (not INTERPRETED and BINARIES.run(self)):
            return
        chosen = {} if INTERPRETED else {"num_warps": self.warps, "num_stages": self.stages, **self.options}
        self.kernel[self.grid](**self.arguments, **self.constants, **chosen)


@dataclass(frozen=True)
class Product:
    """y [..., N] = x [..., K] · weight [N, K]ᵀ as torch multiplies matrices, after launches that make one of them."""

    x: Tensor
    weight: Tensor
    y: Tensor

    @property
    def arguments(self) -> dict[str, Any]:
        """As of a launch."""
        return {"x": self.x, "weight": self.weight, "y": self.y}

    def run(self) -> None:
        """Multiplies."""
        rows, width = self.weight.shape
        torch.mm(self.x.view(-1, width), self.weight.mT, out=self.y.view(-1, rows))


class Plan(NamedTuple):
    """What is launched, in order, and the tensors that hold the result after it."""

    result: Any
    launches: list[Any]  # of Launch and Product

    def run(self) -> Any:
        """The result."""
        for launch in self.launches:
            launch.run()
        return self.result

    @property
    def compiled(self) -> list[Launch]:
        """The launches that Triton compiles."""
        return [launch for launch in self.launches if isinstance(launch, Launch)]


def operation(
    on_cpu: Callable[..., Any],
    reference: Callable[..., Any],
    plan: Callable[..., Plan],
    outside: Callable[..., str | None],
    shaped: Callable[..., Any],
) -> Any:
    """``on_cpu`` as an operation of torch, by its name, that ``plan`` does on GPUs: a function that calls it.

    Inputs ``outside`` the plan's envelope (it says why) are computed by ``reference`` there, through which gradients
    are taken, too; ``shaped`` makes an empty result. The operation's namespace is a digest of the file and
    of those that it imports: checkpoints that carry different versions can be loaded side by side.
    """
    name = f"compress_model_{digest_of(Path(on_cpu.__code__.co_filename))}::{on_cpu.__name__}"
    plain = _registered(name, on_cpu, reference, plan, outside, shaped)
    tracked = _registered(f"{name}_with_gradients", on_cpu, reference, plan, outside, shaped, gradients=True)

    @functools.wraps(on_cpu)
    def call(*inputs: Any, **named: Any) -> Any:
        return (tracked if torch.is_grad_enabled() else plain)(*inputs, **named)

    return call


def digest_of(file: Path) -> str:
    """Twelve digits that are those of ``file`` and of the files beside it that it imports, in any folder."""
    read: dict[str, bytes] = {}
    pending = [file]
    while pending:
        path = pending.pop()
        if path.name not in read:
            read[path.name] = path.read_bytes()
            found = re.findall(rb"^from \.(\w*) import (\w*)", read[path.name], re.MULTILINE)
            pending += [path.with_name(f"{(module or name).decode()}.py") for module, name in found]
    return hashlib.sha256(b"".join(read[name] for name in sorted(read))).hexdigest()[:12]


def _registered(
    name: str,
    on_cpu: Callable[..., Any],
    reference: Callable[..., Any],
    plan: Callable[..., Plan],
    outside: Callable[..., str | None],
    shaped: Callable[..., Any],
    gradients: bool = False,
) -> Any:
    # What torch does in Python for gradients, and what custom_op would check at each call, is felt in decoding: of
    # the two operations one has no gradients, and neither is checked but by the tests.
    space, _, own = name.partition("::")
    if not hasattr(getattr(torch.ops, space), own):
        torch.library.define(name, torch.library.infer_schema(on_cpu, mutates_args=()))

        def on_gpu(*inputs: Any) -> Any:
            if outside(*inputs):
                return reference(*inputs)
            with torch.cuda.device_of(inputs[0]):
                made = plan(*inputs)
                runs = triton is not None or all(map(BINARIES.has, made.compiled))
                return made.run() if runs else reference(*inputs)

        torch.library.impl(name, "cpu", on_cpu)
        torch.library.impl(name, "cuda", on_gpu)
        torch.library.register_fake(name, shaped)
        if gradients:
            torch.library.register_autograd(name, _differentiated(reference), setup_context=_keep)
    return getattr(getattr(torch.ops, space), own).default


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps what the gradient is computed from: the inputs alone."""
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def _differentiated(reference: Callable[..., Any]) -> Callable[..., Any]:
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(context.saved_tensors)
        inputs = [next(tensors).detach() if other is None else other[0] for other in context.others]
        wanted = [index for index, needed in enumerate(context.needs_input_grad) if needed]
        with torch.enable_grad():
            for index in wanted:
                inputs[index].requires_grad_()
            result = reference(*inputs)
        found = torch.autograd.grad(
            result, [inputs[index] for index in wanted], gradients, allow_unused=True, materialize_grads=True
        )
        by_index = dict(zip(wanted, found, strict=True))
        return tuple(by_index.get(index) for index in range(len(inputs)))

    return backward


def ceil_div(size: int, by: int) -> int:
    """How many pieces of ``by`` cover ``size``."""
    return -(-size // by)


def power_of_two(size: int) -> int:
    """The least power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def first_reason(checks: Iterable[tuple[bool, str]]) -> str | None:
    """The reason of the first check that fails."""
    return next((reason for holds, reason in checks if not holds), None)


class Gpu(NamedTuple):
    """What plans ask of a GPU: its multiprocessors, and whether the programs of a grid can wait for each other."""

    processors: int
    waits: bool


H100 = Gpu(132, True)
_ELSEWHERE: ContextVar[Gpu] = ContextVar("gpu", default=H100)


@contextmanager
def planned_for(gpu: Gpu) -> Generator[None]:
    """Launches that are planned meanwhile, for tensors that are on no GPU, are those for ``gpu``."""
    before = _ELSEWHERE.set(gpu)
    try:
        yield
    finally:
        _ELSEWHERE.reset(before)


def gpu_of(tensor: Tensor) -> Gpu:
    """The tensor's GPU; without one that which launches are ``planned_for``, by default an H100."""
    return _gpu_of(tensor.device) if tensor.is_cuda else _ELSEWHERE.get()


@functools.cache
def _gpu_of(device: torch.device) -> Gpu:
    return Gpu(torch.cuda.get_device_properties(device).multi_processor_count, not torch.version.hip)
