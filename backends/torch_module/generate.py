"""From a graph to the files of a checkpoint that carries its own code."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from backends.torch_module.assembly import Assembly, Generated
from backends.torch_module.calls import KernelCall, Reach, calls_of, longest
from backends.torch_module.causal import CausalAssembly
from backends.torch_module.classes import classes_of
from backends.torch_module.code import camel, identifier
from backends.torch_module.encoder import EncoderAssembly, add_masks, ending
from backends.torch_module.layout import layout_of, parent
from backends.torch_module.model import Model
from backends.torch_module.pair import (
    DECODER,
    PairAssembly,
    add_extras,
    is_paired,
    named_parts,
    part_in,
    parts_of,
    written,
)
from backends.torch_module.prepare import prepared
from backends.torch_module.program import ATTENTION, Call, Extras, program_of, stacks_of
from backends.torch_module.sizes import sizes_of
from backends.torch_module.stages import add_stages
from backends.torch_module.token_emitters import TOKEN_EMITTERS
from compiler.errors import TargetError
from compiler.ir.graph import Graph, Node, Value
from compiler.ir.layers import layer_of
from compiler.ir.stages import shows_window

__all__ = ["Generated", "generate", "kernel_calls"]


def generate(graph: Graph, *, cache_bits: int = 0, compact: bool = False, binaries: bool = False) -> Generated:
    """The files for ``graph``. Raises TargetError when something in it has no code.

    ``cache_bits`` 8 or 4 rounds what attention caches; ``compact`` loads sparse weights from bits and values,
    and is an error when there are none; with ``binaries`` the code looks for compiled kernels beside the checkpoint.
    Reads no weight but rotary frequencies.
    """
    assembly = _assembly(graph, cache_bits)
    if binaries:
        assembly.model.helpers.add("kernel_binary")
    return assembly.generated(compact)


def kernel_calls(graph: Graph, dtype: torch.dtype, cache_bits: int = 0) -> list[KernelCall]:
    """The calls of kernels that the code for ``graph`` makes when it is loaded as ``dtype``. Raises TargetError."""
    config = graph.origin.config or {}
    assembly = _assembly(graph, cache_bits)
    return list(calls_of(assembly.graph, assembly.model.layout, Reach(dtype, cache_bits, longest(config))))


def _assembly(graph: Graph, cache_bits: int) -> Assembly:
    if is_paired(graph):
        return _pair(graph, cache_bits)
    if not _continues(graph):
        if cache_bits:
            raise TargetError(
                "a cache of fewer bits is for models that continue text or recordings; this one does not",
                remedy="leave out `cache-bits`",
            )
        return _encoder(graph)
    graph = prepared(graph, _tokens(graph))
    extras = Extras()
    _add_extras(list(graph.nodes), extras)
    staged = add_stages(graph, extras)
    if staged and cache_bits:
        raise TargetError(
            "what scores tokens of prompts reads keys as they are: their cache is not rounded",
            remedy="leave out `cache-bits`",
        )
    _check_by_token(graph, "input_ids", graph.nodes)
    nodes = [*graph.nodes, *(staged.nodes if staged else ())]
    body_path = _body_path(graph)
    layout = layout_of(graph, body_path, nodes)
    program = program_of(graph, nodes, layout, extras)
    inner = next((item.body for item in program.items if isinstance(item, Call) and item.name == "model"), None)
    stacks = stacks_of(program)
    if inner is None or len(stacks) != 1:
        raise TargetError("a generated module is made of one stack of layers; this model has another structure")
    classes = classes_of(program, layout, extras)
    prefix, name = _names(graph)
    (loop,) = stacks.values()
    sizes = sizes_of(graph, layout, {"": len(loop.layers)})
    model = Model(prefix, layout, extras, sizes, classes, stacks, graph.sources, cache_bits)
    return CausalAssembly(graph, model, name, program, inner, loop, staged)


def _continues(graph: Graph) -> bool:
    """Whether the graph is a language model that scores the next token."""
    attention = graph.nodes_named(*ATTENTION)
    if list(graph.outputs) != ["logits"] or not attention or "input_ids" not in graph.inputs:
        return False
    scored = graph.outputs["logits"].shape[:-1] == graph.inputs["input_ids"].shape
    return scored and all(node.attr("causal") for node in attention)


def _encoder(graph: Graph) -> Assembly:
    ending(graph)
    if "input_ids" in graph.inputs:
        _check_whole(graph)
    graph = prepared(graph)
    nodes, extras = list(graph.nodes), Extras()
    add_masks(graph, extras)
    layout = layout_of(graph, None, nodes)
    program = program_of(graph, nodes, layout, extras)
    classes = classes_of(program, layout, extras)
    stacks = stacks_of(program)
    if len(stacks) != 1:
        raise TargetError(f"a generated module has one stack of layers; this model has {len(stacks)}")
    (loop,) = stacks.values()
    prefix, name = _names(graph)
    sizes = sizes_of(graph, layout, {"": len(loop.layers)})
    sizes.everywhere.setdefault("hidden_size", loop.entering.shape[-1])
    model = Model(prefix, layout, extras, sizes, classes, stacks, graph.sources)
    return EncoderAssembly(graph, model, name, program)


def _pair(graph: Graph, cache_bits: int) -> Assembly:
    _check_whole(graph)
    graph = prepared(graph, DECODER)
    _check_by_token(graph, DECODER, written(graph))
    nodes, extras, parts = list(graph.nodes), Extras(), parts_of(graph)
    add_extras(graph, extras)
    body_path = parent(next(iter(parts)))
    layout = layout_of(graph, body_path, nodes)
    paths = named_parts(layout, parts, body_path)
    program = program_of(graph, nodes, layout, extras)
    inner = next(item.body for item in program.items if isinstance(item, Call) and item.name == "model")
    encoder, decoder = (part_in(inner, paths[word]) for word in ("encoder", "decoder"))
    extras.named[encoder.body.outputs[0]] = "encoder_hidden_states"
    classes = classes_of(program, layout, extras)
    prefix, name = _names(graph)
    both = {"encoder": encoder, "decoder": decoder}
    sizes = sizes_of(graph, layout, {word: len(part.loop.layers) for word, part in both.items()})
    source = graph.origin.config or {}
    sizes.everywhere |= {name: source[name] for name in PLACES if isinstance(source.get(name), int)}
    stacks = {f"{part.body.path}.{part.loop.name}": part.loop for part in both.values()}
    model = Model(prefix, layout, extras, sizes, classes, stacks, graph.sources, cache_bits, paired=True)
    return PairAssembly(graph, model, name, program, inner, encoder, decoder)


def _check_whole(graph: Graph) -> None:
    """No encoder drops tokens of samples that may be padded. Raises TargetError."""
    for node in graph.nodes_named("token_select", "token_match"):
        cause = "a generated encoder drops no tokens of samples that may be padded"
        raise TargetError(cause, where=node.scope, remedy="write `emit: [onnx: {target: ort-cpu}]`")


def _tokens(graph: Graph) -> str:
    if list(graph.inputs) != ["input_ids"] or list(graph.outputs) != ["logits"]:
        raise TargetError(
            f"a generated module takes input_ids and makes logits; this model takes {', '.join(graph.inputs)} "
            f"and makes {', '.join(graph.outputs)}"
        )
    if any(not node.attr("causal") for node in graph.nodes_named(*ATTENTION)):
        raise TargetError("a generated module continues text; this model has attention that looks ahead")
    for node in graph.nodes_named("attention"):
        if node.optional_input(4) is not None and not shows_window(node.input(4)):
            raise TargetError("attention with a bias on its scores cannot go on from a cache", where=node.scope)
    return "input_ids"


PLACES = ("max_source_positions", "max_target_positions")

MIXES = frozenset({"conv", "cumsum", "pad", "arange"})
"""Operations that no token can do by itself, whatever their axes."""


def _check_by_token(graph: Graph, tokens: str, nodes: Iterable[Node]) -> None:
    """Of ``nodes`` only attention looks at other ``tokens``: a cache holds nothing else. Raises TargetError."""
    length = graph.inputs[tokens].shape[1]
    for node in nodes:
        if node.op.name in MIXES or any(value.shape[axis] == length for value, axis in _axes(node)):
            raise TargetError(f"`{node.op.name}` looks at other tokens, which a cache does not hold", where=node.scope)


def _axes(node: Node) -> list[tuple[Value, int]]:
    """The axes of operands that an operation mixes, picks from or joins along."""
    if node.op.name in ATTENTION or node.op.name in TOKEN_EMITTERS:
        return []
    if node.op.name == "matmul":
        return [(node.input(0), -1), (node.input(1), -2)]
    axes = node.attrs.get("axes", ()) or ([node.attr("axis")] if "axis" in node.op.attrs else [])
    return [(value, axis) for value in node.inputs[:1] if value is not None for axis in axes]


def _add_extras(nodes: list[Node], extras: Extras) -> None:
    for node in nodes:
        if node.op.name in ATTENTION:
            window = node.attr("window")
            mask = extras.masks.setdefault(window, Value(f"mask_{window}", extras.cache.type))
            extras.of_node[node] = [mask, extras.cache]


def _body_path(graph: Graph) -> str:
    stacks = {layer.stack for node in graph.nodes if (layer := layer_of(node.scope)) is not None}
    if len(stacks) != 1:
        raise TargetError(f"a generated module is made of one stack of layers; this model has {len(stacks)}")
    return stacks.pop().rpartition(".")[0]


def _names(graph: Graph) -> tuple[str, str]:
    """The prefix of classes, and the model type, which no class of transformers has."""
    config = graph.origin.config or {}
    family = str(config.get("model_type") or identifier(graph.name).lower())
    architecture = graph.origin.architecture or camel(family)
    prefix = re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", architecture)
    return f"Compressed{prefix}", f"compressed_{identifier(family)}"
