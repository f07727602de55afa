"""Numbers of operations that may differ between layers: which they are, and what they may be of the model."""

from __future__ import annotations

from typing import Any

from backends.torch_module.program import Item
from backends.torch_module.sizes import Sizes
from compiler.ir.graph import Node, Param, Value

OPERAND_SIZES = {
    ("experts", 3): ("num_experts", "2 * moe_intermediate_size", "hidden_size"),
    ("experts", 4): ("num_experts", "hidden_size", "moe_intermediate_size"),
    ("experts", 5): ("num_experts", "2 * moe_intermediate_size"),
    ("experts", 6): ("num_experts", "hidden_size"),
    ("attention", 5): ("num_attention_heads",),
    ("matmul", 1): ("num_attention_heads", "head_dim", "qk_nope_head_dim + qk_rope_head_dim"),
}
"""What the sizes of weights are that operations take without a module around them."""

WORDS = {"keep": "kept_tokens"}
HINTS = {
    "keep": ("kept_tokens",),
    "count": ("num_experts_per_tok",),
    "value": ("v_head_dim", "head_dim"),
    "rotated": ("qk_rope_head_dim",),
}
"""What numbers of operations may be."""


def number_at(item: Item, name: str, place: int | None) -> Any:
    assert isinstance(item, Node)
    if name == "width":
        return item.attr("stop") - item.attr("start")
    if name in ("value", "rotated"):  # the width of the second of the two that attention caches
        return item.input(2).shape[-1] if item.optional_input(2) is not None else 0
    value = item.attr(name)
    return value if place is None else value[place]


def is_size(item: Item, name: str) -> bool:
    if name == "count":  # of a top-k that chooses experts
        return isinstance(item, Node) and any(user.op.name == "experts" for user in item.outputs[1].users)
    return name in ("heads", "width", "start", "stop", "shape", "value", "rotated", "keep")


def heads_of(item: Item) -> tuple[str, ...]:
    """Whose heads a ``split_heads`` makes: those of the operand of attention that it becomes."""
    if not isinstance(item, Node) or item.op.name != "split_heads":
        return ()
    either = ("num_attention_heads", "num_key_value_heads")
    pending, seen = list(item.output.users), set[Node]()
    while pending:
        node = pending.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node.op.name == "attention":
            ours = {value for value in node.inputs[:1] if value}
            return either if _reaches(item, ours) else either[::-1]
        if node.op.name in ("rope", "rms_norm", "layer_norm", "slice", "concat"):
            pending += [user for output in node.outputs for user in output.users]
    return either


def _reaches(node: Node, values: set[Value]) -> bool:
    """Whether ``node`` is among what makes ``values``, by way of operations that keep heads apart."""
    pending = list(values)
    while pending:
        maker = pending.pop().node
        if maker is node:
            return True
        if maker is not None and maker.op.name in ("rope", "rms_norm", "layer_norm", "slice", "concat", "mul"):
            pending += [value for value in maker.inputs if value is not None and not isinstance(value, Param)]
    return False


def word(item: Item) -> str:
    return item.op.name if isinstance(item, Node) else "size"


def known(sizes: Sizes, name: str) -> bool:
    return name in sizes.everywhere or name in sizes.by_layer
