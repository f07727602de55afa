"""Any model in, one graph out: export, import, lift, verify. No weight is read."""

from __future__ import annotations

import io
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from compiler.errors import CaptureError, CompressError
from compiler.frontend.fold import LayerList, NotFoldableError, layer_lists, unfold
from compiler.frontend.grids import given, repeat
from compiler.frontend.importer import Importer
from compiler.frontend.lift import lift
from compiler.frontend.params import order_params
from compiler.frontend.skip import check_readers, passing_through
from compiler.frontend.subject import Subject, subject_of
from compiler.ir.graph import Graph
from compiler.ir.verify import verify

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def capture(
    model: str | Path | nn.Module | PretrainedConfig,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    architecture: str | None = None,
    image: int | None = None,
) -> Graph:
    """The graph of a model, lifted and verified, its weights bound but unread.

    ``model`` is a checkpoint (directory, GGUF file or hub id), a config, or a live module in eval mode. ``inputs`` are
    example inputs by name, needed for a module that is no transformers model; only their shapes and dtypes matter, but
    for values of a ``grid_thw``, the grid of the pictures that a tower is captured for.
    ``architecture`` names a transformers class where the config does not; pictures are ``image`` pixels high and wide,
    by default as the config says. Raises CaptureError naming what cannot be
    captured and where it stands.
    """
    subject = subject_of(model, inputs, architecture, image)
    graph = fold_layers(subject) or trace_all(subject)
    verify(graph)
    graph.origin = replace(graph.origin, apart=_apart(graph, subject))
    return graph


def _apart(graph: Graph, subject: Subject) -> tuple[str, ...]:
    """The outermost modules of which the graph has no weight; single weights that it never reads are none."""
    read = {name for param in graph.params.values() for name in (param.name, *param.aliases)}
    shared = {name[:end] for name in read for end in _ends(name)}
    unread = [name for name in subject.names if name not in read and name not in subject.transient]
    outermost = (next((name[:end] for end in _ends(name) if name[:end] not in shared), "") for name in unread)
    return tuple(dict.fromkeys(name for name in outermost if name))


def _ends(name: str) -> list[int]:
    """Where the paths of the modules that hold a weight end in its name."""
    return [index for index, character in enumerate(name) if character == "."]


def fold_layers(subject: Subject) -> Graph | None:
    """The graph from two traced layers of each kind, or None when they do not stand for all."""
    lists = layer_lists(subject.module)
    if not lists:
        return None
    try:
        program = _export_kept(subject, lists)
        check_readers(program, lists)
        graph = _imported(subject, program)
        unfold(graph, subject, lists)
        order_params(graph, subject.names)
    except NotFoldableError:
        return None
    return graph


def _export_kept(subject: Subject, lists: Sequence[LayerList]) -> ExportedProgram:
    """Trace the layers that are kept. What torch cannot follow then may be the passing through."""
    try:
        return traced(subject, lists)
    except CaptureError as error:
        if error.__cause__ is None:
            raise
        raise NotFoldableError("torch cannot pass layers through") from error


def trace_all(subject: Subject) -> Graph:
    """The graph from a trace of the whole module."""
    return _imported(subject, traced(subject))


def _imported(subject: Subject, program: ExportedProgram) -> Graph:
    graph = Importer(subject, program).run()
    if subject.grid is not None:
        repeat(graph, subject.grid.patches)
    lift(graph)
    order_params(graph, subject.names)
    return graph


def traced(subject: Subject, lists: Sequence[LayerList] = ()) -> ExportedProgram:
    """The program of ``subject``, not to be changed; of ``lists`` only the layers that are kept.

    A stock class of one config is traced once: a job meets it when it plans, when it runs and when it looks for a
    class to write. Raises CaptureError when torch cannot follow the model.
    """
    trace = _Trace(subject, lists)
    return _remembered(trace) if subject.stock else export(trace)


class _Trace:
    """What is traced, without its weights. Two of one class, config, inputs and layers are equal."""

    def __init__(self, subject: Subject, lists: Sequence[LayerList]) -> None:
        self.module, self.inputs, self.dims, self.lists = subject.module, subject.inputs, subject.dims, lists
        self.known = {} if subject.grid is None else subject.grid.known
        config: Any = getattr(subject.module, "config", None)
        shapes = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in subject.inputs.items()]
        values = sorted(config.to_dict().items()) if subject.stock else id(self)
        self._key = f"{values} {shapes} {subject.dims} {lists}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Trace) and (type(self.module), self._key) == (type(other.module), other._key)

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=64)
def _remembered(trace: _Trace) -> ExportedProgram:
    """Small even of deep models, of which two layers of each kind are traced."""
    return export(trace)


def export(trace: _Trace) -> ExportedProgram:
    """Trace a module. Raises CaptureError when torch cannot follow it."""
    dynamic: dict[str, Any] = {name: dict.fromkeys(trace.dims[name], Dim.AUTO) for name in trace.inputs}
    try:
        with torch.no_grad(), _quiet(), passing_through(trace.module, trace.lists), given(trace.module, trace.known):
            program = torch.export.export(trace.module, (), dict(trace.inputs), dynamic_shapes=dynamic, strict=False)
            program.graph.eliminate_dead_code()  # such as a head of a tower that nothing reads
            return program
    except (CompressError, NotFoldableError):
        raise
    except Exception as reason:
        first = str(reason).strip().partition("\n")[0]
        name = type(trace.module).__name__
        raise CaptureError(
            f"torch cannot trace `{name}`: {type(reason).__name__}: {first}",
            remedy="what is computed must not depend on the values of tensors" if "data-dependent" in first else "",
        ) from reason


@contextmanager
def _quiet() -> Generator[None]:
    """Keep to itself what torch says about a trace that fails: whole graphs, on the standard error."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
