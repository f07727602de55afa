"""From a graph to an ONNX model: inputs that decoding needs, every operation by its rule, named outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from backends.onnx.builder import DTYPES, Builder, Stored
from backends.onnx.cache import ATTENTION, PAST, TOTAL_AXIS, Cache
from backends.onnx.emitters import RULES
from backends.onnx.fusion import fusions
from backends.onnx.masks import Masks
from backends.onnx.stages import Stages, stage_table
from backends.onnx.target import (
    CONTRIB,
    CONTRIB_VERSION,
    IR_VERSION,
    OPSET,
    RECENT,
    RECENT_RUNTIME,
    SCATTER,
    SCATTER_OPSET,
    Target,
)
from compiler.errors import TargetError
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import copy_of
from compiler.ir.positions import given_positions
from compiler.ir.stages import named_stages, own_places, restore_windows

TOKENS, MASK, KEPT = "input_ids", "attention_mask", "logits_to_keep"
SCORED_AXIS = "scored_sequence"
STAGED_TARGETS = ("ort-cpu", "onnx")
COUNTING = ("arange", "cumsum")


@dataclass(frozen=True)
class Lowered:
    """One ONNX model. ``stored`` are its tensors in files, ``graph`` is what it computes, ``cached`` the names of what
    it keeps of past tokens; ``stages`` says how long that is in which layers, where prompts lose tokens (JSON)."""

    graph: Graph
    target: Target
    inputs: Sequence[ir.Value]
    outputs: Sequence[ir.Value]
    nodes: Sequence[ir.Node]
    constants: Sequence[ir.Value]
    stored: Mapping[str, Stored]
    cached: Sequence[str]
    notes: Mapping[str, int]
    stages: str = ""

    def model(self, metadata: Mapping[str, str]) -> ir.Model:
        """The model, whose stored tensors have their values by now."""
        defaults = [value for value in self.inputs if value.const_value is not None]
        initializers = [*self.constants, *(stored.value for stored in self.stored.values()), *defaults]
        versions = {"": self.opset, **({CONTRIB: CONTRIB_VERSION} if self.operations(CONTRIB) else {})}
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=initializers,
            opset_imports=versions,
            name=self.graph.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="compress-model", metadata_props=dict(metadata))

    @property
    def in_place(self) -> bool:
        """Whether all that is cached can be written where it was read, in buffers that are longer."""
        keys = [name for name in self.cached if not name.endswith(".positions")]
        entries = {f"{PAST}.{name}" for name in keys}
        readers = {use.node.op_type for value in self.inputs if value.name in entries for use in value.uses()}
        return bool(keys) and readers <= {"GroupQueryAttention", SCATTER}

    @property
    def opset(self) -> int:
        """The version of standard operations."""
        return SCATTER_OPSET if SCATTER in self.operations("") else OPSET

    @property
    def runtime(self) -> str:
        """The oldest ONNX Runtime that is known to run it."""
        coded = any(value.dtype == ir.DataType.INT8 for value in self.inputs)
        recent = coded or any(node.op_type in RECENT for node in self.nodes)
        return RECENT_RUNTIME if recent else self.target.runtime

    def operations(self, domain: str) -> list[str]:
        """The operations of ``domain`` that it uses."""
        return sorted({node.op_type for node in self.nodes if node.domain == domain})


def is_causal(graph: Graph) -> bool:
    """Whether ``graph`` scores the next token at each of its tokens, seeing none after it."""
    attends = graph.nodes_named(*ATTENTION)
    if list(graph.inputs) != [TOKENS] or list(graph.outputs) != ["logits"] or not attends:
        return False
    tokens = graph.inputs[TOKENS].shape
    return graph.outputs["logits"].shape[:-1] == tokens and all(node.attr("causal") for node in attends)


def lowered(
    graph: Graph,
    target: Target,
    *,
    accuracy: int = 4,
    rounds: bool = True,
    many: bool = False,
    unrounded: frozenset[str] = frozenset(),
) -> Lowered:
    """``graph`` for ``target``; ``many`` for prompts only. Reads no weight. Other options are those of ``Builder``.

    A causal language model gets a cache and a mask for padding, an encoder of tokens a mask; all sizes but batch and
    tokens are fixed. Raises TargetError naming the operation and its scope for what has no ONNX form.
    """
    copy, causal = copy_of(graph), is_causal(graph)
    build = Builder(copy, target, axis_names(copy), accuracy=accuracy, rounds=rounds, many=many, unrounded=unrounded)
    inputs = add_inputs(build, copy)
    if TOKENS in copy.inputs:
        inputs.append(add_mask(build, copy, TOKENS, cached=causal))
    if causal:
        _go_on_from_cache(build, copy)
        inputs += _keep_logits(build, copy)
    if target.contrib:
        cached = (build.cache.tokens, *build.cache.stages) if build.cache else ()
        build.fusions = fusions(copy, cached, joins=not many)  # many tokens are soon multiplied, and slow to take apart
    emit_nodes(build, copy)
    return finished(build, copy, inputs)


def axis_names(graph: Graph) -> dict[str, str]:
    """What symbolic dims of inputs are called in the file."""
    names: dict[str, str] = {}
    for name, value in graph.inputs.items():
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, str):
                shown = "decoder_sequence" if name.startswith("decoder") else "sequence"
                rows = "batch" if dim.isidentifier() else f"{dim.partition('*')[0]}*batch"
                names.setdefault(dim, rows if axis == 0 else shown if axis == 1 else dim.lower())
    return names


def add_inputs(build: Builder, graph: Graph) -> list[ir.Value]:
    """The graph's own inputs."""
    for name, value in graph.inputs.items():
        build.fresh(name)
        shape = build.named_shape(value.type)
        build.values[value] = ir.Value(name=name, type=ir.TensorType(DTYPES[value.type.dtype]), shape=shape)
    made = [build.values[value] for value in graph.inputs.values()]
    for value in graph.inputs.values():
        build.values[value] = in_target(build, build.values[value], value.type.dtype)
    return made


def in_target(build: Builder, given: ir.Value, dtype: torch.dtype) -> ir.Value:
    """``given`` of the graph's ``dtype`` in what the target computes in."""
    kind = build.kind(dtype)
    return given if kind == DTYPES[dtype] else build.op("Cast", given, to=kind)


def add_mask(build: Builder, graph: Graph, tokens: str, *, cached: bool) -> ir.Value:
    """An input that says which tokens are there: those of the input ``tokens``, and ``cached`` ones before them."""
    batch, length = graph.inputs[tokens].shape
    shape = ir.Shape([build.axes[str(batch)], TOTAL_AXIS if cached else build.axes[str(length)]])
    given = ir.Value(name=MASK, type=ir.TensorType(ir.DataType.INT64), shape=shape)
    build.masks = Masks(build, given, length, cached=cached)
    return given


def _go_on_from_cache(build: Builder, graph: Graph) -> None:
    """Positions follow from the mask; keys and values are joined with those of past tokens."""
    tokens = graph.inputs[TOKENS]
    restore_windows(graph)
    named = named_stages(graph)
    if named and build.target.name not in STAGED_TARGETS:
        cause = (
            f"`{build.target.name}` has one length for the caches of all layers, and prompts lose tokens behind some"
        )
        raise TargetError(cause, where=named[0].choice.scope, remedy="write `target: ort-cpu` or `onnx`")
    for node in graph.nodes_named("latent_attention") if named else ():
        raise TargetError("latents are cached in one length for all layers", where=node.scope, remedy="drop no tokens")
    places = given_positions(graph, TOKENS)
    graph.prune()
    named = own_places(graph, named)
    for node in graph.nodes_named(*COUNTING):
        raise TargetError(f"`{node.op.name}` over tokens cannot go on from a cache", where=node.scope)
    for name in [name for name in graph.inputs if name != TOKENS]:
        del graph.inputs[name]
    build.cache = Cache(build, tokens.shape[1], stages=[stage.dim for stage in named])
    build.values[places] = build.masks.query_places()
    build.stages = Stages(build, {stage.choice: stage for stage in named})
    build.stages.begin()


def _keep_logits(build: Builder, graph: Graph) -> Sequence[ir.Value]:
    """How many of the last tokens are scored, an input with a default: 0 is all of them. Where it is known that only
    the last token of each sample is wanted, that is taken, and there is no input."""
    heads = [node for node in graph.nodes if node.op.name == "linear" and _ends(node)]
    build.head = heads[-1] if heads else None
    if build.target.genai:
        build.last = build.masks.last_tokens()
        return []
    default = ir.tensor([0], dtype=ir.DataType.INT64, name=KEPT)
    shape, kind = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
    build.kept = ir.Value(name=KEPT, const_value=default, shape=shape, type=kind)
    return [build.kept]


def _ends(node: Node) -> bool:
    """Whether what follows ``node`` is done token by token, up to an output."""
    value = node.output
    while value.users:
        user = value.single_user()
        if user is None or len(user.outputs) > 1:
            return False
        if sum(not isinstance(each, Param) for each in user.inputs if each is not None) > 1:
            return False
        value = user.output
    return True


def emit_nodes(build: Builder, graph: Graph) -> None:
    """Append the ONNX nodes of every operation. Raises TargetError for one without a rule."""
    for node in graph.nodes:
        if node in build.fusions.absorbed:
            continue
        build.scope = node.scope
        rule = RULES.get(node.op.name)
        if rule is None:
            raise TargetError(f"`{node.op.name}` has no ONNX form", where=node.scope)
        unknown = sorted(node.op.attrs.keys() - rule.attrs)
        if unknown:
            raise TargetError(f"the ONNX form of `{node.op.name}` knows no {', '.join(unknown)}", where=node.scope)
        _bind(build, node, rule.emit(build, node))
    build.scope = ""


def _bind(build: Builder, node: Node, made: ir.Value | Sequence[ir.Value]) -> None:
    parts = build.fusions.grouped.get(node)
    if parts is not None and parts.merge is not None:
        node = parts.merge
    for value, result in zip(node.outputs, [made] if isinstance(made, ir.Value) else made, strict=True):
        build.bind(value, result)


def finished(build: Builder, graph: Graph, inputs: Sequence[ir.Value]) -> Lowered:
    """The model of all that was appended, with the graph's outputs and the cache under their names."""
    outputs = [_output(build, name, _as_in_graph(build, value)) for name, value in graph.outputs.items()]
    if build.head is not None:
        logits = graph.outputs["logits"].type
        outputs[0].shape = ir.Shape([build.axes[str(logits.shape[0])], SCORED_AXIS, logits.shape[2]])
    cache = build.cache
    past, present = (cache.inputs, cache.outputs) if cache is not None else ((), ())
    return Lowered(
        graph,
        build.target,
        [*inputs, *past],
        [*outputs, *present],
        build.nodes,
        list(build.constants.values()),
        {stored.name: stored for stored in build.stored.values()},
        list(cache.past) if cache is not None else [],
        build.notes,
        stage_table(graph, cache, list(build.stages.chosen.values())) if cache and build.stages else "",
    )


def _as_in_graph(build: Builder, value: Value) -> ir.Value:
    """An output in the dtype that the graph gives it."""
    made, dtype = build.value(value), value.type.dtype
    if build.kind(dtype) == DTYPES[dtype]:
        return made
    cast = build.op("Cast", made, to=DTYPES[dtype])
    cast.type, cast.shape = ir.TensorType(DTYPES[dtype]), made.shape
    return cast


def _output(build: Builder, name: str, value: ir.Value) -> ir.Value:
    """``value`` under the name of an output; one that has a name already is passed on."""
    if value.producer() is None or value.name in build.graph.outputs:
        value, passed = build.op("Identity", value), value
        value.type, value.shape = passed.type, passed.shape
    value.name = name
    return value
