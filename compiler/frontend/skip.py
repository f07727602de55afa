"""Passing layers through while a model is traced, and making sure afterwards that nobody noticed.

A layer that is passed through hands on what it was given, under a mark of its own: whatever reads a deep layer's
result (a feature map, an operation between layers) is seen to read that layer, and the model is then traced whole.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from compiler.frontend.fold import LayerList, NotFoldableError
from compiler.frontend.importer import scope_of
from compiler.frontend.interfaces import passed


@dataclass
class _Previous:
    """What the layer before returned, and those of its tensors that it did not only hand through."""

    result: Any = None
    made: list[Tensor] = field(default_factory=list[Tensor])


@contextmanager
def passing_through(module: nn.Module, lists: Sequence[LayerList]) -> Generator[None]:
    """Make every layer that is not kept return what the layer before it returned, marked as its own."""
    layers = [(module.get_submodule(some.path), some) for some in lists]
    for children, some in layers:
        previous = _Previous()
        for index, layer in enumerate(children.children()):
            kept = index in some.kept
            layer.forward = _recorded(layer.forward, previous) if kept else _passing(index, previous)
    try:
        yield
    finally:
        for children, _ in layers:
            for layer in children.children():
                del layer.forward


def _recorded(forward: Callable[..., Any], previous: _Previous) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        given = _identities((args, kwargs))
        previous.result = forward(*args, **kwargs)
        previous.made = [tensor for tensor in _tensors(previous.result) if id(tensor) not in given]
        return previous.result

    return run


def _passing(index: int, previous: _Previous) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not any(id(tensor) in _identities((args, kwargs)) for tensor in previous.made):
            raise NotFoldableError("a layer does not read what the one before it returned")
        marked = {id(tensor): passed(tensor, index) for tensor in previous.made}
        previous.result = pytree.tree_map_only(Tensor, lambda x: marked.get(id(x), x), previous.result)
        previous.made = list(marked.values())
        return previous.result

    return run


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _identities(tree: Any) -> set[int]:
    return {id(tensor) for tensor in _tensors(tree)}


def check_readers(program: ExportedProgram, lists: Sequence[LayerList]) -> None:
    """Raises NotFoldableError when a layer that others are put after is read by anything but the next one."""
    for layers in lists:
        last = len(layers.kinds) - 1
        unread = (set(range(last)) - set(layers.kept)) | ({layers.kept[-1]} - {last})
        for node in program.graph.nodes:
            index = layers.index_of(scope_of(node))
            readers = {layers.index_of(scope_of(user)) for user in node.users}
            if index in unread and readers - {index, index + 1}:
                raise NotFoldableError("what a layer computes is read beyond the next one")
