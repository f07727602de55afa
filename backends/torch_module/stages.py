"""Prompts that lose tokens, in a generated language model: each stage of layers has positions and a mask of its own.

What is new to a graph here are two operations of generated modules alone: the positions of a stage's tokens, which the
cache keeps as one layer more, and what its attention may look at.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from backends.torch_module.code import Code
from backends.torch_module.emitters import Emitter, Site, arg
from backends.torch_module.program import ATTENTION, Extras
from compiler.errors import TargetError
from compiler.ir.graph import Graph, Node, Value
from compiler.ir.layers import layer_of
from compiler.ir.opdef import Attr, OpDef
from compiler.ir.positions import POSITIONS
from compiler.ir.stages import Stage, named_stages, own_places, scored
from compiler.ir.types import Dim, TensorType


def _nothing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError


PLACES = OpDef(
    "stage_places",
    "places index present cache",
    _nothing,
    _nothing,
    {"stage": Attr("int"), "new": Attr("bool")},
)
MASK = OpDef("stage_mask", "places keys cache", _nothing, _nothing, {"layer": Attr("int"), "window": Attr("int")})


@dataclass
class Staged:
    """The stages of a language model. ``present`` says which new tokens are there, ``lengths`` how many of each sample;
    ``nodes`` are operations besides the graph's."""

    present: Value
    lengths: Value
    nodes: list[Node] = field(default_factory=list[Node])


def add_stages(graph: Graph, extras: Extras) -> Staged | None:
    """Give the choices and the attention of ``graph`` what they read besides; None when prompts lose nothing.

    Raises TargetError where layers of a stage have several windows.
    """
    stages = own_places(graph, named_stages(graph))
    if not stages:
        return None
    if len({node.attr("window") for node in graph.nodes_named(*ATTENTION)}) > 1:
        raise TargetError("prompts that lose tokens have one window for all layers in a generated module")
    whole = stages[0].choice.input(0).type
    lengths = TensorType(torch.int64, whole.shape[:1])
    staged = Staged(Value("present", TensorType(torch.bool, whole.shape)), Value("lengths", lengths))
    extras.named |= {staged.present: "present", staged.lengths: "lengths"}
    known = {stages[0].before: (staged.present, graph.inputs[POSITIONS])}
    for number, stage in enumerate(stages):
        present, places = known[stage.before]
        _read_present(graph, extras, stage, present, staged)
        index, present = stage.choice.outputs
        extras.named[present] = "present"
        known[stage.dim] = present, _enter(graph, extras, staged, stage, (places, index, present), number)
    return staged


def _read_present(graph: Graph, extras: Extras, stage: Stage, present: Value, staged: Staged) -> None:
    choice, scores = stage.choice, scored(stage.choice.input(0))
    choice.attrs = {**choice.attrs, "keep": stage.count}  # what a count is written of
    extras.of_node[choice] = [present, staged.lengths, extras.cache]
    extras.choosing.add(choice)
    if scores is not None:
        extras.of_node[scores] = [present]
    blocks = choice.input(0).node
    if blocks is not None and blocks.op.name == "token_blocks":
        extras.of_node[blocks] = [present]
    for node in graph.nodes_named("token_restore"):
        if node.input(2) is choice.outputs[0]:
            extras.of_node[node] = [choice.outputs[1]]


def _enter(
    graph: Graph, extras: Extras, staged: Staged, stage: Stage, chosen: tuple[Value, Value, Value], number: int
) -> Value:
    """The positions of the stage's tokens, and the mask of its attention."""
    inner = [node for node in graph.nodes_named(*ATTENTION) if _tokens(node) == stage.dim]
    layer = layer_of(stage.choice.scope)
    assert layer is not None  # tokens go where layers are
    scope, kind = layer.stack.rpartition(".")[0], TensorType(torch.int64, chosen[1].shape)
    if stage.places is not None:
        del graph.inputs[stage.places.name]
    made = stage.places or Value("", kind)
    keys = Value("", TensorType(torch.int64, (kind.shape[0], f"S{number}")))
    attrs = {"stage": number, "new": stage.renumbered}
    staged.nodes.append(_node(PLACES, [*chosen, extras.cache], attrs, [made, keys], scope))
    for node in inner[:1]:
        first = layer_of(node.scope)
        assert first is not None  # so is attention
        mask = Value("", extras.cache.type)
        attrs = {"layer": first.index, "window": node.attr("window")}
        staged.nodes.append(_node(MASK, [made, keys, extras.cache], attrs, [mask], scope))
        for each in inner:
            extras.of_node[each] = [mask, extras.cache]
    return made


def _tokens(node: Node) -> Dim:
    return node.input(1).shape[1 if node.op.name == "latent_attention" else 2]


def _node(op: OpDef, inputs: Sequence[Value], attrs: Mapping[str, Any], outputs: list[Value], scope: str) -> Node:
    """A node that is in no graph, and so in no use list."""
    node = Node(op, list(inputs), dict(attrs), outputs, scope)
    for value in outputs:
        value.node = node
    return node


def count_code(dim: Dim, name: str) -> str:
    """``dim``, of so many tokens of a prompt, as code in which the tensor ``name`` says how many these are."""
    return _code(ast.parse(str(dim), mode="eval").body, name)


def _code(node: ast.expr, name: str) -> str:
    match node:
        case ast.Call(func=ast.Name(id="floor"), args=[inner]):
            slope, rest = _linear(inner)
            bottom = math.lcm(slope.denominator, rest.denominator)
            top, more = int(slope * bottom), int(rest * bottom)
            scaled = name if top == 1 else f"{top} * {name}"
            return f"({scaled} + {more}) // {bottom}" if more else f"{scaled} // {bottom}"
        case ast.Call(func=ast.Name(id="Min"), args=[ast.Constant(value=int(most)), ast.Name()]):
            return f"{name}.clamp(max={most})"
        case ast.Call(func=ast.Name(id="Max"), args=[part, ast.Call(args=[ast.Constant(value=int(least)), _])]):
            return f"({_code(part, name)}).clamp(min={least})"  # no sample keeps more than it has
        case ast.Call(func=ast.Name(id="Max"), args=[ast.Call(args=[ast.Constant(value=int(least)), _]), part]):
            return f"({_code(part, name)}).clamp(min={least})"
        case _:
            raise TargetError(f"a generated module cannot keep {ast.unparse(node)} tokens")


def _linear(node: ast.expr) -> tuple[Fraction, Fraction]:
    """a * x + c, of one name x, as (a, c)."""
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(0), Fraction(value)
        case ast.Name():
            return Fraction(1), Fraction(0)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            (a, c), (b, d) = _linear(left), _linear(right)
            return a + b, c + d
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            (a, c), (b, d) = _linear(left), _linear(right)
            return a * d + b * c, c * d
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            (a, c), (_, d) = _linear(left), _linear(right)
            return a / d, c / d
        case _:
            raise TargetError(f"a generated module cannot compute {ast.unparse(node)}")


def _places(site: Site) -> Code:
    given, stage = [arg(site, index).text for index in range(4)], site.node.attr("stage")
    slot = " + ".join(["self.config.num_hidden_layers", *([str(stage)] if stage else [])])
    function = site.helper("counted_places" if site.node.attr("new") else "stage_places")
    return Code(f"{function}({', '.join([*given, slot])})")


def _mask(site: Site) -> Code:
    given = [arg(site, index).text for index in range(3)]
    window = f", {site.node.attr('window')}" if site.node.attr("window") else ""
    return Code(f"{site.helper('stage_mask')}({', '.join(given)}, {site.node.attr('layer')}{window})")


STAGE_EMITTERS: dict[str, Emitter] = {"stage_places": _places, "stage_mask": _mask}
