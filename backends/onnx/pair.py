"""Encoder-decoders as two models: an encoder, which also makes the keys and values that the decoder attends to, and a
decoder with a cache of its own tokens. The encoder runs once a source, and nothing of it runs again for a new token."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder
from backends.onnx.cache import PAST, Cache
from backends.onnx.lower import (
    COUNTING,
    TOKENS,
    Lowered,
    add_inputs,
    add_mask,
    axis_names,
    emit_nodes,
    finished,
)
from backends.onnx.target import Target
from compiler.errors import TargetError
from compiler.ir.graph import Graph, Node, Value
from compiler.ir.layers import copy_of
from compiler.ir.positions import given_positions
from compiler.ir.relative import COLUMNS, KEYS, QUERIES, by_position, hoist

DECODER, ENCODER_MASK, SOURCE_AXIS = "decoder_input_ids", "encoder_attention_mask", "encoder_sequence"


def is_pair(graph: Graph) -> bool:
    """Whether ``graph`` is an encoder and a decoder that scores its next token."""
    names = list(graph.inputs)
    return len(names) == 2 and names[1] == DECODER and next(iter(graph.outputs), "") == "logits"


def crossings(graph: Graph) -> list[Node]:
    """The attentions of the decoder's tokens to what the encoder made, in order."""
    reached, found = {graph.inputs[DECODER]}, list[Node]()
    for node in graph.nodes:
        if reached.intersection(value for value in node.inputs if value is not None):
            reached.update(node.outputs)
            if node.op.name == "attention" and node.input(1) not in reached:
                found.append(node)
    return found


def lowered_encoder(graph: Graph, target: Target, *, accuracy: int = 4, rounds: bool = True) -> Lowered:
    """The encoder: its own outputs, and a key and a value for each attention that crosses over."""
    copy = copy_of(graph)
    kept = {name: value for name, value in copy.outputs.items() if name != "logits"}
    for number, node in enumerate(crossings(copy)):
        kept |= {_crossed(number, what): node.input(index) for index, what in ((1, "key"), (2, "value"))}
    copy.outputs = kept
    copy.prune()
    del copy.inputs[DECODER]
    build = Builder(copy, target, axis_names(copy), accuracy=accuracy, rounds=rounds)
    inputs = add_inputs(build, copy)
    if TOKENS in copy.inputs:
        inputs.append(add_mask(build, copy, TOKENS, cached=False))
    emit_nodes(build, copy)
    return finished(build, copy, inputs)


def lowered_decoder(graph: Graph, target: Target, *, accuracy: int = 4, rounds: bool = True) -> Lowered:
    """The decoder: tokens, their mask, what the encoder made, and past tokens' keys and values."""
    copy = copy_of(graph)
    source = next(iter(copy.inputs))
    hoist(copy)
    tokens_of_source = copy.inputs[source].shape[1] if source == TOKENS else ""
    for number, node in enumerate(crossings(copy)):
        for index, what in ((1, "key"), (2, "value")):
            value = node.input(index)
            copy.replace(value, copy.add_input(f"{PAST}.{_crossed(number, what)}", value.type))
    copy.outputs = {"logits": copy.outputs["logits"]}
    by_position(copy, DECODER)
    places = given_positions(copy, DECODER)
    copy.prune()
    del copy.inputs[source], copy.inputs[places.name]
    columns = [copy.inputs.pop(name, None) for name in (QUERIES, KEYS)]
    for node in copy.nodes_named(*COUNTING):
        raise TargetError(f"`{node.op.name}` over tokens cannot go on from a cache", where=node.scope)
    axes = {**axis_names(copy), str(tokens_of_source): SOURCE_AXIS}
    build = Builder(copy, target, axes, accuracy=accuracy, rounds=rounds)
    inputs = add_inputs(build, copy)
    inputs.insert(1, add_mask(build, copy, DECODER, cached=True))
    if tokens_of_source:
        inputs.insert(2, _source_mask(build, copy, str(tokens_of_source)))
    build.cache = Cache(build, copy.inputs[DECODER].shape[1], part=".decoder")
    build.values[places] = build.masks.query_places()
    _bind_columns(build, columns)
    emit_nodes(build, copy)
    return finished(build, copy, inputs)


def _crossed(number: int, what: str) -> str:
    return f"{number}.encoder.{what}"


def _source_mask(build: Builder, graph: Graph, tokens: str) -> ir.Value:
    """Which of the source's tokens are there."""
    batch = build.axes[str(graph.inputs[DECODER].shape[0])]
    given = ir.Value(name=ENCODER_MASK, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([batch, SOURCE_AXIS]))
    build.masks.source, build.masks.source_tokens = given, tokens
    return given


def _bind_columns(build: Builder, columns: Sequence[Value | None]) -> None:
    """Biases by distance follow from the columns of new tokens and of all tokens there are."""
    queries, keys = columns
    if queries is None or keys is None:
        return
    total = build.op("Shape", build.masks.given, start=1, end=2)
    build.sizes[COLUMNS] = total
    nothing = build.ints(0)
    build.values[queries] = build.op("Squeeze", build.masks.query_columns(), nothing)
    stop = build.op("Squeeze", total, nothing)
    build.values[keys] = build.op("Range", build.scalar(0, torch.int64), stop, build.scalar(1, torch.int64))
