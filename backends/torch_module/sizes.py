"""Numbers of a graph under the names that configs use: hidden_size, num_attention_heads, kv_lora_rank, ...

A quantity that is the same in all layers is one number in the config; one that differs is a list with an entry for each
layer. A number in the code is written as an expression of quantities when that is right for every place it stands for.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backends.torch_module.layout import Layout, Leaf
from backends.torch_module.packing import SCHEME, scheme_name
from compiler.ir.graph import Graph, Node, Param
from compiler.ir.layers import layer_of
from compiler.ir.roles import roles
from compiler.ir.sites import attention_sites, expert_sites, latent_sites, mlp_sites
from compiler.weights.evaluate import evaluate

Number = int | float

COMMON = (
    "hidden_size",
    "vocab_size",
    "intermediate_size",
    "num_attention_heads * head_dim",
    "num_key_value_heads * head_dim",
    "num_key_value_heads * v_head_dim",
    "num_attention_heads * v_head_dim",
    "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)",
    "num_attention_heads * (qk_nope_head_dim + v_head_dim)",
    "kv_lora_rank + qk_rope_head_dim",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim + qk_rope_head_dim",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "head_dim",
    "moe_intermediate_size",
    "2 * moe_intermediate_size",
    "num_experts",
    "max_position_embeddings",
    "max_source_positions",
    "max_target_positions",
)
BY_ROLE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "attention.query": (
        ("num_attention_heads * head_dim", "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)"),
        (),
    ),
    "attention.key": (("num_key_value_heads * head_dim",), ()),
    "attention.value": (("num_key_value_heads * head_dim", "num_key_value_heads * v_head_dim"), ()),
    "attention.output": (
        ("hidden_size",),
        ("num_attention_heads * head_dim", "num_attention_heads * v_head_dim"),
    ),
    "attention.query_down": (("q_lora_rank",), ()),
    "attention.query_up": (("num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)",), ("q_lora_rank",)),
    "attention.kv_down": (("kv_lora_rank + qk_rope_head_dim", "kv_lora_rank", "qk_rope_head_dim"), ()),
    "attention.kv_up": (("num_attention_heads * (qk_nope_head_dim + v_head_dim)",), ("kv_lora_rank",)),
    "mlp.gate": (("intermediate_size",), ()),
    "mlp.up": (("intermediate_size",), ()),
    "mlp.down": (("hidden_size",), ("intermediate_size",)),
    "router": (("num_experts",), ()),
    "embedding": (("vocab_size", "max_position_embeddings"), ("hidden_size",)),
    "head": (("vocab_size",), ("hidden_size",)),
}
"""For matrices of a role, what rows and columns are likely to be."""


@dataclass
class Sizes:
    """``everywhere`` are quantities of the whole model, ``by_layer`` those of one layer, by name and layer number.

    Names of ``by_layer`` begin with the part of the model that the layers are of; ``layers`` says how many each has.
    """

    layout: Layout
    roles: dict[Param, set[str]]
    layers: Mapping[str, int]
    everywhere: dict[str, Any] = field(default_factory=dict[str, Any])
    by_layer: dict[str, dict[int, Any]] = field(default_factory=dict[str, dict[int, Any]])

    def note(self, name: str, path: str, value: Any) -> None:
        """Record a quantity of the layer that ``path`` lies in, or of the model. The first of a name stays."""
        layer = layer_of(path)
        if layer is None:
            self.everywhere.setdefault(name, value)
        else:
            self.by_layer.setdefault(_of(self.layout.part(path), name), {}).setdefault(layer.index, value)

    def at(self, path: str) -> dict[str, Any]:
        """The quantities that hold at ``path``."""
        layer, start = layer_of(path), _of(self.layout.part(path), "")
        found = {name: values for name, values in self.by_layer.items() if name.startswith(start)}
        local = {name: values[layer.index] for name, values in found.items() if layer and layer.index in values}
        return {**self.everywhere, **{name.removeprefix(start): value for name, value in local.items()}}

    def varies(self, name: str) -> bool:
        """Whether the config has a list of ``name``, an entry for each layer."""
        found = self.by_layer.get(name, {})
        return name not in self.everywhere and len({repr(value) for value in found.values()}) > 1

    def reference(self, expression: str, part: str = "") -> str:
        """An expression of quantities as code within ``__init__(self, config, layer_idx)`` of a class of ``part``."""
        return re.sub(r"[A-Za-z_]\w*", lambda found: self._name(self.known(found[0], part)), expression)

    def known(self, name: str, part: str) -> str:
        """What the config calls the quantity ``name`` of ``part``."""
        own = _of(part, name)
        return own if own in self.by_layer or own in self.everywhere else name

    def _name(self, name: str) -> str:
        return f"config.{name}[layer_idx]" if self.varies(name) else f"config.{name}"

    def expression(self, places: Mapping[str, Number], candidates: Iterable[str] = ()) -> str | None:
        """An expression that has the given value at every path of ``places``, the likeliest first."""
        known = {path: self.at(path) for path in places}
        for candidate in (*candidates, *COMMON):
            if all(evaluated(candidate, known[path]) == value for path, value in places.items()):
                return candidate
        return None

    def config(self) -> dict[str, Any]:
        """What the config holds of all this."""
        found = dict(self.everywhere)
        for name, values in self.by_layer.items():
            if self.varies(name):
                none = type(next(iter(values.values())))()  # 0 or [] for a layer that has no such thing
                part = next((part for part in self.layers if name.startswith(_of(part, ""))), "")
                found[name] = [values.get(index, none) for index in range(self.layers[part])]
            else:
                found.setdefault(name, next(iter(values.values())))
        return found


def _of(part: str, name: str) -> str:
    return f"{part}_{name}" if part else name


def likely(role_names: set[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What rows and columns of a matrix of these roles may be called."""
    pairs = [BY_ROLE[name] for name in sorted(role_names) if name in BY_ROLE]
    rows = [candidate for pair in pairs for candidate in pair[0]]
    return rows, [candidate for pair in pairs for candidate in pair[1]]


def evaluated(expression: str, names: Mapping[str, Any]) -> Number | None:
    """The value of an expression of sums, products and powers; None when a name is unknown."""
    return _value(ast.parse(expression, mode="eval").body, names)


def _value(node: ast.expr, names: Mapping[str, Any]) -> Number | None:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name):
            found = names.get(name)
            return found if isinstance(found, int | float) else None
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _value(operand, names)
            return None if value is None else -value
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, names), _value(right, names)
            return None if a is None or b is None else _combined(op, a, b)
        case _:
            return None


def _combined(op: ast.operator, a: Number, b: Number) -> Number:
    if isinstance(op, ast.Add):
        return a + b
    return a * b if isinstance(op, ast.Mult) else a**b


def sizes_of(graph: Graph, layout: Layout, layers: Mapping[str, int]) -> Sizes:
    """The quantities that attention, MLPs, experts and tables of the graph show. ``layers`` are counts by part."""
    sizes = Sizes(layout, roles(graph), layers)
    where = layout.container
    for node in _of_tokens(graph)[:1]:
        rows, width = node.input(0).type.static_shape
        sizes.everywhere |= {"vocab_size": rows, "hidden_size": width}
    sizes.everywhere |= {_of(part, "num_hidden_layers"): count for part, count in layers.items()}
    for site in attention_sites(graph):
        _note(sizes, where.get(site.node), num_attention_heads=site.heads, num_key_value_heads=site.groups)
        _note(sizes, where.get(site.node), head_dim=site.head_dim)
        if site.value_dim != site.head_dim:
            _note(sizes, where.get(site.node), v_head_dim=site.value_dim)
    latents = latent_sites(graph)
    for site in [site for site in attention_sites(graph) if site.causal] if latents else []:
        _note(sizes, where.get(site.node), kv_lora_rank=0)  # tells the cache that it holds keys and values
    for latent in latents:
        _note(sizes, where.get(latent.node), num_attention_heads=latent.heads, kv_lora_rank=latent.rank)
        _note(sizes, where.get(latent.node), qk_rope_head_dim=latent.rotary_dim, qk_nope_head_dim=latent.unrotated_dim)
        _note(sizes, where.get(latent.node), v_head_dim=latent.value_dim)
        if latent.query_down is not None:
            _note(sizes, where.get(latent.node), q_lora_rank=latent.query_down.output.shape[-1])
    for node in graph.nodes_named("split_heads"):
        _note_heads(sizes, node)
    for experts in expert_sites(graph):
        width = experts.down.shape[-1]
        _note(sizes, where.get(experts.node), num_experts=experts.count, moe_intermediate_size=width)
        _note(sizes, where.get(experts.node), num_experts_per_tok=experts.active)
    for mlp in mlp_sites(graph):
        _note(sizes, where.get(mlp.down), intermediate_size=mlp.down.input(0).shape[-1])
    for name in sizes.by_layer:
        sizes.everywhere.pop(name, None)  # of a part beside the layers, which is no quantity of the model
    _note_frequencies(sizes, graph)
    _note_schemes(sizes, layout)
    return sizes


def frequencies_name(leaf: Leaf) -> str:
    """What the config calls the frequencies of a rotary table."""
    return leaf.name.replace("rotary_emb", "rope_frequencies")


def _note_frequencies(sizes: Sizes, graph: Graph) -> None:
    for node in graph.nodes_named("rope_table"):
        leaf, param = sizes.layout.leaves.get(node), node.input(1)
        if leaf is not None and isinstance(param, Param):
            (values,) = evaluate([param.expr], graph.sources)
            sizes.note(frequencies_name(leaf), leaf.path, values.float().tolist())


def _note_schemes(sizes: Sizes, layout: Layout) -> None:
    """How weights are packed: the commonest scheme once, and where modules of a name have others too, what each has.

    Left to the classes where a name does not say which module of a layer is meant.
    """
    schemes = {path: layout.schemes[param] for path, param in layout.named().items() if param in layout.schemes}
    if not schemes:
        return
    common = Counter(schemes.values()).most_common(1)[0][0]
    sizes.everywhere[SCHEME] = common._asdict()
    by_name: dict[str, list[str]] = {}
    for path in schemes:
        by_name.setdefault(scheme_name(path), []).append(path)
    for name, paths in by_name.items():
        layers = {layer_of(path) for path in paths}
        clear = len(layers) == len(paths) and (None not in layers or len(layers) == 1)
        if clear and any(schemes[path] != common for path in paths):
            for path in paths:
                sizes.note(name, path, schemes[path]._asdict())


def _of_tokens(graph: Graph) -> list[Node]:
    """Tables of vectors, those first whose rows the model's input picks."""
    given = set(graph.inputs.values())
    return sorted(graph.nodes_named("embedding"), key=lambda node: node.input(1) not in given)


def _note_heads(sizes: Sizes, node: Node) -> None:
    """Heads of keys and values that are made without an attention over them: a latent is made from them."""
    path = sizes.layout.container[node]
    known = sizes.at(path)
    if 1 < node.attr("heads") < known.get("num_attention_heads", 0):
        _note(sizes, path, num_key_value_heads=node.attr("heads"), head_dim=node.output.shape[-1])


def _note(sizes: Sizes, path: str | None, **quantities: Any) -> None:
    for name, value in quantities.items():
        if path is not None:
            sizes.note(name, path, value)
