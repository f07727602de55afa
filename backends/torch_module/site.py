"""What an emitter sees of the operation that it writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from backends.torch_module.code import Code
from compiler.ir.graph import Node
from compiler.ir.types import Dim


class Site(Protocol):
    """One operation of a class, and what its code may refer to."""

    @property
    def node(self) -> Node: ...
    @property
    def args(self) -> list[Code | None]: ...
    def leaf(self) -> str | None:
        """The submodule that does the operation (``self.q_proj``), when it is one."""
        ...

    def weight(self) -> str | None:
        """The weight of that submodule as a tensor."""
        ...

    def dense(self, node: Node) -> str | None:
        """The submodule that does a linear map ``node`` of the class, when it holds its weight as it is."""
        ...

    def size(self, name: str, index: int | None = None) -> str:
        """A number that may differ between the modules of the class: an attribute, or entry ``index`` of a tuple."""
        ...

    def dim(self, dim: Dim) -> str:
        """A symbolic size in terms of the shapes of arguments."""
        ...

    def like(self, dtype: torch.dtype | None = None) -> str:
        """An argument that is a tensor, for its device."""
        ...

    @property
    def bits(self) -> str:
        """How many bits what is cached is rounded to, as code; "" where it is not."""
        ...

    @property
    def rotation(self) -> str:
        """The basis that latents are cached in, as code; "" for their own."""
        ...

    def helper(self, name: str) -> str:
        """The name of a function of the module, which is added to it."""
        ...


Emitter = Callable[[Site], Code]


def arg(site: Site, index: int) -> Code:
    found = site.args[index] if index < len(site.args) else None
    if found is None:
        raise ValueError(f"{site.node.op.name} has no operand {index}")
    return found


def optional(site: Site, index: int) -> str | None:
    found = site.args[index] if index < len(site.args) else None
    return found.text if found is not None else None
