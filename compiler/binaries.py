"""Kernels that are compiled beforehand and written beside a checkpoint that calls them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backends.safetensors import Emission
from compiler.errors import TargetError
from compiler.ir.graph import Graph

if TYPE_CHECKING:
    from backends.kernels.launch import Launch
    from backends.torch_module.calls import KernelCall
    from compiler.recipe.schema import Safetensors

FOLDER = "kernels"
"""In the checkpoint, in the layout of Hugging Face's ``kernels``."""


def check_compiler() -> None:
    """Raises TargetError when nothing here compiles kernels."""
    from backends.kernels.launch import INTERPRETED

    if find_spec("triton") is None:
        raise TargetError(
            "`binaries` needs Triton, which compiles them", remedy="pip install triton, or leave out `binaries`"
        )
    if INTERPRETED:
        raise TargetError("Triton interprets kernels and compiles none", remedy="unset TRITON_INTERPRET")


def check_launches(graph: Graph, emission: Emission, wanted: Safetensors) -> None:
    """Raises TargetError when the checkpoint calls no kernel."""
    if not _calls(graph, emission, wanted):
        raise TargetError(
            "`binaries`: no kernel computes anything of this model",
            remedy="leave it out, or let a pass make packed weights (of codebooks those with `group: 0`), factors, "
            "latents or a cache of few bits",
        )


def write_binaries(
    graph: Graph,
    emission: Emission,
    wanted: Safetensors,
    directory: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the folder ``kernels`` for the targets of ``wanted`` into the checkpoint's ``directory``.

    The digest of what it lists goes into the checkpoint's code. Raises TargetError when one does not compile.
    """
    from backends.binaries.package import NAMES_MANIFEST, unique, write_package
    from backends.kernels import aot

    calls = _calls(graph, emission, wanted)
    launches = {target: unique(launches_of(calls, target)) for target in wanted.binaries}
    name = emission.config["model_type"].replace("_", "-")
    digest = write_package(directory / FOLDER, name, {call.kernel for call in calls}, launches, on_progress)
    source = Path(aot.__file__).read_text(encoding="utf-8")
    named = source.replace(f'MANIFEST = "{aot.MANIFEST}"', f'MANIFEST = "{digest}"')
    (directory / NAMES_MANIFEST).write_text(named, encoding="utf-8")


def _calls(graph: Graph, emission: Emission, wanted: Safetensors) -> list[KernelCall]:
    from backends.torch_module import kernel_calls

    return kernel_calls(graph, getattr(torch, emission.config["dtype"]), wanted.cache_bits or 0)


def launches_of(calls: Sequence[KernelCall], target: str) -> Iterator[Launch]:
    """What ``calls`` launch on each GPU of ``target`` that is known."""
    from backends.binaries.compile import PROCESSORS
    from backends.kernels.launch import Gpu, planned_for

    for processors in PROCESSORS[target]:
        with planned_for(Gpu(processors, target.startswith("sm_"))):
            for kernel, inputs in calls:
                file: Any = importlib.import_module(f"backends.kernels.{kernel}")
                if file.outside(*inputs) is None:
                    yield from file.plan(*inputs).compiled
