"""Any model in, one graph out: export, import, lift, verify. No weight is read."""

from __future__ import annotations

import io
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from compiler.errors import CaptureError, CompressError
from compiler.frontend.fold import LayerList, NotFoldableError, layer_lists, unfold
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
) -> Graph:
    """The graph of a model, lifted and verified, its weights bound but unread.

    ``model`` is a checkpoint (directory, GGUF file or hub id), a config, or a live module in eval mode. ``inputs`` are
    example inputs by name, needed for a module that is no transformers model; only their shapes and dtypes matter.
    ``architecture`` names a transformers class where the config does not. Raises CaptureError naming what cannot be
    captured and where it stands.
    """
    subject = subject_of(model, inputs, architecture)
    graph = fold_layers(subject) or trace_all(subject)
    verify(graph)
    return graph


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
        with passing_through(subject.module, lists):
            return export(subject)
    except CaptureError as error:
        if error.__cause__ is None:
            raise
        raise NotFoldableError("torch cannot pass layers through") from error


def trace_all(subject: Subject) -> Graph:
    """The graph from a trace of the whole module."""
    return _imported(subject, export(subject))


def _imported(subject: Subject, program: ExportedProgram) -> Graph:
    graph = Importer(subject, program).run()
    lift(graph)
    order_params(graph, subject.names)
    return graph


def export(subject: Subject) -> ExportedProgram:
    """Trace the subject. Raises CaptureError when torch cannot follow the model."""
    dynamic: dict[str, Any] = {name: dict.fromkeys(subject.dims[name], Dim.AUTO) for name in subject.inputs}
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(subject.module, (), dict(subject.inputs), dynamic_shapes=dynamic, strict=False)
    except (CompressError, NotFoldableError):
        raise
    except Exception as reason:
        first = str(reason).strip().partition("\n")[0]
        name = type(subject.module).__name__
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
