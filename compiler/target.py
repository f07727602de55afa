"""What a graph is written as: a stock class where one holds it, otherwise a class generated from the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from backends.safetensors import Emission, Refusal, dtype_name, propose
from backends.safetensors.compressed import config_of_generated
from backends.safetensors.gptq import Version
from backends.safetensors.parts import stored_parts
from backends.safetensors.unify import Mismatch
from compiler.binaries import check_compiler, check_launches
from compiler.errors import TargetError
from compiler.ir.facts import what_is_apart
from compiler.ir.graph import Graph, Param
from compiler.weights.expr import Expr
from compiler.weights.ops.codec import is_quantised
from compiler.weights.ops.sparse import as_scatter
from compiler.weights.tokens import renumbered

if TYPE_CHECKING:
    from backends.gguf import GgufEmission
    from backends.onnx import OnnxEmission
    from compiler.recipe import Recipe
    from compiler.recipe.schema import Safetensors

ZEROS = "zeros of sparse weights are stored like other numbers and save nothing; `sparse: compact` leaves them out"

ModelClass = Literal["auto", "stock", "generated"]


def emission_of(
    graph: Graph,
    model_class: ModelClass = "auto",
    cache_bits: int | None = None,
    *,
    compact: bool = False,
    binaries: bool = False,
) -> Emission:
    """The checkpoint for ``graph``, of a stock class or with its own code as ``model_class`` says. Reads no weight.

    ``cache_bits`` 8 or 4 rounds what attention caches, ``compact`` stores sparse weights as bits and values, and
    ``binaries`` of kernels will lie beside it; stock classes can none of these. Raises TargetError when there is no
    such checkpoint.
    """
    _check_no_blocks(graph)
    own = _Own(cache_bits or 0, compact, binaries)
    return replace(_emission(graph, model_class, own), tokens=graph.tokens)


class _Own(NamedTuple):
    """What only generated code can: see ``emission_of``."""

    cache_bits: int
    compact: bool
    binaries: bool

    @property
    def reason(self) -> str:
        """Why no stock class will do; "" when one may."""
        reasons = {
            f"none caches in {self.cache_bits} bits": self.cache_bits,
            "none loads sparse weights from bits and values": self.compact,
            "none calls kernels that come with it": self.binaries,
        }
        return next((reason for reason, wanted in reasons.items() if wanted), "")


def _emission(graph: Graph, model_class: ModelClass, own: _Own) -> Emission:
    found = _stock(graph, model_class, own)
    if isinstance(found, Emission):
        return _noted(found, graph)
    if model_class == "stock":
        raise TargetError(
            _none(found.reason),
            remedy="leave out the pass that made it so, or let the checkpoint carry its own code (`class: auto`)",
        )
    made = _generated(graph, found.reason, own)
    return made if own.compact else _noted(made, graph)


def checkpoint_for(graph: Graph, recipe: Recipe) -> Emission | None:
    """The checkpoint that ``recipe`` asks for; None when it asks for none."""
    wanted = recipe.checkpoint
    if wanted is None or wanted.quantised_as == "compressed-tensors":
        return wanted and _written_as(graph, wanted)
    return gptq_emission(graph, wanted.quantised_as)


def _written_as(graph: Graph, wanted: Safetensors) -> Emission:
    if wanted.binaries:
        check_compiler()
    own = {"compact": wanted.compact, "binaries": bool(wanted.binaries)}
    found = emission_of(graph, wanted.class_, wanted.cache_bits, **own)
    if wanted.binaries:
        check_launches(graph, found, wanted)
    return found


def gptq_emission(graph: Graph, version: Version) -> Emission:
    """The GPTQ checkpoint of ``graph``. Raises TargetError when the layout, or no stock class, holds it."""
    _check_no_blocks(graph)
    found = propose(graph, version)
    if isinstance(found, Refusal):
        raise TargetError(f"no GPTQ checkpoint holds this: {found.reason}", remedy="leave out `quantised-as`")
    if not found.quantization_config:
        raise TargetError(
            "`quantised-as` is a layout of quantised weights, and none is", remedy="put `quantize` before"
        )
    return replace(found, tokens=graph.tokens)


def onnx_for(graph: Graph, recipe: Recipe) -> OnnxEmission | None:
    """The ONNX models that ``recipe`` asks for; None when it asks for none. Raises TargetError without onnx-ir."""
    wanted = recipe.onnx
    if wanted is None:
        return None
    try:
        from backends.onnx import propose
    except ImportError as reason:
        raise TargetError(
            f"ONNX models need the package {reason.name}, which is not installed",
            remedy="pip install 'compress-model[onnx]'",
        ) from reason
    found = propose(graph, wanted.target, accuracy=wanted.accuracy_level, prompts=wanted.prompts)
    if wanted.input_error is not None:
        from backends.onnx.levels import require_products

        require_products(found)
        if recipe.calibration is None:
            cause = "`input-error` is measured on calibration data, and there is none"
            raise TargetError(cause, remedy="add `calibration: {data: text.txt}`")
    return found


def _check_no_blocks(graph: Graph) -> None:
    """Raises TargetError when weights are in block formats of GGUF files."""
    held = [param.name for param in graph.params.values() if param.expr.op == "dequantize_gguf"]
    if held:
        raise TargetError(
            f"{held[0]} is in a block format of GGUF files, and so are {len(held) - 1} more weights",
            remedy="write `emit: [gguf]`; `type: int` is for safetensors",
        )


def gguf_for(graph: Graph, recipe: Recipe) -> GgufEmission | None:
    """The GGUF file that ``recipe`` asks for; None when it asks for none."""
    return None if recipe.gguf is None else gguf_emission(graph)


def gguf_emission(graph: Graph) -> GgufEmission:
    """The GGUF file of ``graph``. Raises TargetError when llama.cpp, or no stock class, holds it."""
    from backends.gguf import propose as propose_gguf

    found = propose(graph, "whole")
    if isinstance(found, Refusal):
        raise TargetError(f"no GGUF file holds this: {found.reason}", remedy="leave `gguf` out of `emit`")
    return propose_gguf(
        found.architecture,
        found.config,
        found.tensors,
        windows={int(node.attr("window")) for node in graph.nodes_named("attention")},
        model=graph.sources.get("model"),
        tokens=graph.tokens,
    )


def _noted(emission: Emission, graph: Graph) -> Emission:
    """``emission``, which says so where it stores zeros that it need not."""
    sparse = any(as_scatter(param.expr) for param in graph.params.values())
    return replace(emission, notes=(*emission.notes, ZEROS)) if sparse else emission


def _stock(graph: Graph, model_class: ModelClass, own: _Own) -> Emission | Refusal:
    if own.reason:
        return Refusal("", own.reason)
    return Refusal("", "the recipe asks for generated code") if model_class == "generated" else propose(graph)


def _generated(graph: Graph, no_stock: str, own: _Own) -> Emission:
    from backends.torch_module import generate, in_reading_order, with_others

    try:
        made = generate(graph, **own._asdict())
    except TargetError as error:
        cause = f"{error.cause}; and {_none(no_stock)}"
        raise TargetError(cause, where=error.where, remedy=error.remedy) from error
    quantised = config_of_generated(made.unpacked)
    if isinstance(quantised, Mismatch):
        raise TargetError(f"{quantised.reason}; and {_none(no_stock)}")
    config = {**_numbered(made.config, graph), "dtype": dtype_name(made.tensors.values())}
    if quantised:
        config["quantization_config"] = quantised.config
    tensors = {key: expr for item in made.tensors.items() for key, expr in _stored(*item, own.compact).items()}
    config, tensors = with_others(config, tensors), in_reading_order(tensors, made.tensors)
    return Emission("generated", made.architecture, config, tensors, what_is_apart(graph), made.files, no_stock)


def _numbered(config: Mapping[str, Any], graph: Graph) -> dict[str, Any]:
    """``config`` with the numbers that tokens have in ``graph``."""
    return dict(config) if graph.tokens is None else renumbered(config, graph.tokens)


def _stored(name: str, param: Param, compact: bool) -> dict[str, Expr]:
    from backends.torch_module import packed, packed_tensors, stored

    value = packed(param)
    if value is not None:
        return packed_tensors(name, value)
    return stored_parts(name, param.expr) if is_quantised(param.expr) else stored(name, param, compact=compact)


def _none(no_stock: str) -> str:
    return f"no stock model class computes this: {no_stock}"
