"""What is written for a graph: a config that a stock class loads, and the tensors under that class's names.

A target proposes a config from facts of the graph. The proposal is captured without weights, as any model is, and
has to be the same program; the comparison yields which of our parameters goes under which of its names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from backends.safetensors.assemble import assemble
from backends.safetensors.cache import Rounded, cache_of, without_rounded_cache
from backends.safetensors.compressed import quantization_config
from backends.safetensors.gptq import gptq_config, gptq_parts_of
from backends.safetensors.parts import stored_parts
from backends.safetensors.rounding import Rounding, by_module, without_rounding
from backends.safetensors.unify import Mismatch, unify
from compiler.errors import CaptureError, TargetError
from compiler.ir.graph import Graph, Param
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import cast
from compiler.weights.ops.codec import is_quantised
from compiler.weights.rows import as_dequantize

Layout = Literal["compressed-tensors", "gptq", "gptq-v2", "whole"]
"""How quantised weights lie in files; ``whole``: as expressions, for another backend to write."""


def missing_names(module: Any, named: Mapping[str, Expr]) -> list[str]:
    """The names in ``module``'s state that are neither in ``named`` nor tied to one that is."""
    tied = module.all_tied_weights_keys
    shared = {*tied, *tied.values()} if {*tied, *tied.values()} & named.keys() else set[str]()
    return [name for name in module.state_dict() if name not in named and name not in shared]


def no_unused(graph: Graph, module: Any, named: Mapping[str, Expr]) -> Mapping[str, Expr] | Mismatch:
    """For classes that compute something with every tensor they have."""
    missing = missing_names(module, named)
    return Mismatch(f"the class has a tensor {missing[0]}, which is not computed with here") if missing else {}


@dataclass(frozen=True)
class Proposal:
    """A config that may be the graph's. ``architecture`` is the transformers class that it is for.

    ``unused(graph, module, named)`` finds the tensors of ``module`` that it computes nothing with, and which are
    therefore not among ``named``: a checkpoint must hold them all the same.
    """

    architecture: str
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    unused: Callable[[Graph, Any, Mapping[str, Expr]], Mapping[str, Expr] | Mismatch] = no_unused


@dataclass(frozen=True)
class Refusal:
    """Why a target cannot hold the graph."""

    target: str
    reason: str


@dataclass(frozen=True)
class Emission:
    """A checkpoint in the making. ``config`` is all of config.json; ``tensors`` are by checkpoint name.

    ``notes`` say which other runtimes than transformers cannot load it, and why. ``files`` are further text files by
    name: the code of a class that is not a stock one, for which ``no_stock`` says why there is none. ``tokens`` are
    those of the source that its tokenizer keeps, in their new order; None for all.
    """

    target: str
    architecture: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Expr]
    notes: tuple[str, ...] = field(default=())
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    no_stock: str = ""
    tokens: Sequence[int] | None = None

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads a checkpoint with its own code; "" for a stock class."""
        return next((name for name in reversed(self.config.get("auto_map", {})) if self.files), "")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(expr.type.nbytes for expr in self.tensors.values())

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        return self.config.get("quantization_config")


def propose(graph: Graph, layout: Layout = "compressed-tensors") -> Emission | Refusal:
    """The emission of the first stock target that holds ``graph``, or the refusal of the one that came nearest.

    ``layout`` is that of quantised weights. No weight is read.
    """
    from backends.safetensors.targets import TARGETS

    plain, rounded = without_rounding(graph)
    plain, caches = without_rounded_cache(plain)
    refusals: list[Refusal] = []
    for target in TARGETS:
        found = _first(_Wanted(plain, rounded, caches, layout), target.name, target.propose(plain))
        if isinstance(found, Emission):
            return found
        refusals.append(found)
    reasons = "; ".join(f"{refusal.target}: {refusal.reason}" for refusal in refusals)
    return Refusal(", ".join(refusal.target for refusal in refusals), reasons)


@dataclass(frozen=True)
class _Wanted:
    """A graph without rounded activations, how what weights multiply is rounded, by name, and what attention caches,
    in order, and a layout for weights."""

    graph: Graph
    rounded: Mapping[str, Rounding]
    caches: Sequence[Rounded]
    layout: Layout


def _first(wanted: _Wanted, target: str, proposals: Sequence[Proposal] | Refusal) -> Emission | Refusal:
    """The emission of the first proposal that fits, or the refusal of the likeliest one."""
    if isinstance(proposals, Refusal):
        return proposals
    refusals: list[Refusal] = []
    for proposal in proposals:
        found = _emission(wanted, target, proposal)
        if isinstance(found, Emission):
            return found
        refusals.append(found)
    return refusals[0]


def require(graph: Graph, layout: Layout = "compressed-tensors") -> Emission:
    """``propose``, with a refusal as a TargetError."""
    found = propose(graph, layout)
    if isinstance(found, Refusal):
        raise TargetError(
            f"no stock model class computes this: {found.reason}",
            remedy="leave out the pass that made it so; `compress-model plan` says where each result can be loaded",
        )
    return found


def _emission(wanted: _Wanted, target: str, proposal: Proposal) -> Emission | Refusal:
    from compiler.frontend.subject import build_on_meta, config_from_dict
    from compiler.weights.checkpoint import unbind

    graph = wanted.graph
    try:
        config = config_from_dict(proposal.config)
        captured = _captured(config, proposal.architecture, graph)
    except CaptureError as error:
        return Refusal(target, f"its class does not run with these sizes: {error.cause}")
    found = unify(captured, graph)
    if isinstance(found, Mismatch):
        return Refusal(target, found.reason)
    module = build_on_meta(config, proposal.architecture)
    named = assemble(captured, {name: _dense(param) for name, param in found.items()})
    if isinstance(named, Mismatch):
        return Refusal(target, named.reason)
    unused = proposal.unused(graph, module, named)
    if isinstance(unused, Mismatch):
        return Refusal(target, unused.reason)
    named = {**named, **unused}
    stored = {key: as_dequantize(expr) or expr for key, expr in unbind(named, module).items()}
    activations = by_module(captured, found, wanted.rounded)
    if isinstance(activations, Mismatch):
        return Refusal(target, activations.reason)
    dtype = dtype_name(found.values())
    cache = cache_of(captured, wanted.caches, stored, getattr(torch, dtype))
    if isinstance(cache, Mismatch):
        return Refusal(target, cache.reason)
    if wanted.layout == "compressed-tensors":
        quantised, parts_of = quantization_config(named, stored, module, activations, cache), stored_parts
    elif wanted.layout == "whole":
        quantised = Mismatch("activations are rounded") if activations or cache else None
        parts_of = _as_it_is
    else:
        rounds = bool(activations or cache)
        quantised, parts_of = gptq_config(named, stored, module, rounds, wanted.layout), gptq_parts_of(wanted.layout)
    if isinstance(quantised, Mismatch):
        return Refusal(target, quantised.reason)
    written = {**proposal.config, "architectures": [proposal.architecture], "dtype": dtype}
    if quantised:
        written["quantization_config"] = quantised.config
    notes = (*proposal.notes, *(quantised.notes if quantised else ()))
    tensors = {name: part for key, expr in stored.items() for name, part in parts_of(key, expr).items()}
    tensors |= {
        key: scale for name, how in activations.items() for key, scale in how.tensors(name, named[name]).items()
    }
    tensors |= cache.tensors if cache else {}
    return Emission(target, proposal.architecture, written, tensors, notes)


def _as_it_is(key: str, expr: Expr) -> dict[str, Expr]:
    return {key: expr}


def _captured(config: Any, architecture: str, graph: Graph) -> Graph:
    """The proposal's graph on inputs like those of ``graph``."""
    from compiler.frontend.capture import capture

    found = capture(config, architecture=architecture)
    if {name: value.type for name, value in found.inputs.items()} == {n: v.type for n, v in graph.inputs.items()}:
        return found
    inputs = {
        name: torch.zeros([2 if isinstance(d, str) else d for d in value.shape], dtype=value.type.dtype)
        for name, value in graph.inputs.items()
    }
    return capture(config, inputs=inputs, architecture=architecture)


def _dense(param: Param) -> Expr:
    """The tensor that stands for ``param``: a quantised one as it is, any other in its storage dtype."""
    return param.expr if is_quantised(param.expr) else cast(param.expr, param.storage)


def dtype_name(params: Iterable[Param]) -> str:
    """The dtype that most of the weights are stored in, as config.json spells it."""
    sizes: dict[torch.dtype, int] = {}
    for param in params:
        if param.storage.is_floating_point:
            sizes[param.storage] = sizes.get(param.storage, 0) + param.type.numel
    dtype = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    return str(dtype).removeprefix("torch.")
