"""What values are called: by what they are used for, otherwise by what makes them."""

from __future__ import annotations

from backends.torch_module.program import Body, Call, Extras, Loop
from compiler.ir.graph import Node, Value

OPERANDS = {
    "attention": ("query", "key", "value"),
    "latent_attention": ("query", "latent", "rotary_key"),
    "experts": ("hidden_states", "indices", "weights"),
    "rope_table": ("position_ids",),
}
HANDED_ON = frozenset(
    {"rope", "split_heads", "rms_norm", "layer_norm", "slice", "concat", "reshape", "transpose", "cast", "expand"}
)
CHOSEN = {
    "token_select": ("index", "rest"),
    "token_match": ("index", "rest", "into"),
    "token_merge": ("hidden_states", "sizes"),
    "stage_places": ("places", "keys"),
    "stage_mask": ("mask",),
}
"""What is said of tokens that go on, and of the others."""
MADE_BY = {
    "token_scores": "scores",
    "softmax": "probabilities",
    "sigmoid": "scores",
    "argmax": "index",
    "compare": "chosen",
    "sum": "total",
    "embedding": "embeddings",
}


def argument_name(value: Value, body: Body, extras: Extras) -> str:
    """What an argument of a module is called."""
    known = _known(value, extras)
    if known or value is _stream(body):
        return known or "hidden_states"
    return _purpose(value, body, 0) or "hidden_states"


def _known(value: Value, extras: Extras) -> str:
    if value is extras.cache:
        return "past_key_values"
    if value in extras.masks.values():
        return "attention_mask"
    if value in extras.named:
        return extras.named[value]
    if value.node is not None and value.node.op.name == "stage_mask":
        return "attention_mask"
    if value.node is not None and value.node.op.name == "token_take":
        return _known(value.node.input(0), extras)
    if value.node is not None and value.node.op.name == "rope_table":
        return ("cos", "sin")[value.node.outputs.index(value)]
    return value.name if value.node is None else ""


def suggestion(value: Value, body: Body, extras: Extras) -> list[str]:
    """Names for ``value`` within ``body``, the best first."""
    if value in extras.named:
        return [extras.named[value]]
    purpose = _purpose(value, body, 0)
    made = _made_by(value, body, extras)
    if purpose == "query" and value.node is not None and value.node.op.name == "slice":
        rotated = any(user.op.name == "rope" for user in value.users)
        return ["query_rot" if rotated else "query_pass"]
    return [name for name in dict.fromkeys((purpose, *made)) if name]


def _purpose(value: Value, body: Body, depth: int) -> str:
    """What all readers of ``value`` in ``body`` use it as, if they agree."""
    found: set[str] = set()
    for node in value.users:
        if node not in body.items or depth > 8:
            return ""
        position = next(index for index, operand in enumerate(node.inputs) if operand is value)
        names = OPERANDS.get(node.op.name, ())
        if position < len(names):
            found.add(names[position])
        elif node.op.name in HANDED_ON and len(node.outputs) == 1:
            found.add(_purpose(node.output, body, depth + 1))
        else:
            return ""
    return found.pop() if len(found) == 1 else ""


def _made_by(value: Value, body: Body, extras: Extras) -> list[str]:
    stream = _stream(body)
    alike = stream is not None and value.type.rank == stream.type.rank and value.shape[1:] == stream.shape[1:]
    first = ["hidden_states"] if alike else []
    if value.node is not None and value.node.op.name in CHOSEN:
        return [CHOSEN[value.node.op.name][value.node.outputs.index(value)]]
    if any(user.op.name == "token_restore" and user.input(0) is value for user in value.users):
        return ["whole"]
    for user in value.users:
        if user.op.name == "token_scores":
            return [("query", "key")[user.inputs.index(value)]]
    call = next((item for item in body.items if isinstance(item, Call) and value in item.body.outputs), None)
    if call is not None and "[" in call.name:
        return ["hidden_states"]
    if call is not None:
        return [*first, f"{call.name}_output"]
    return [*first, *_by_operation(value.node, value)]


def _stream(body: Body) -> Value | None:
    """What runs through the body: its first argument of rank 3, or what its layers hand on."""
    loop = next((item for item in body.items if isinstance(item, Loop)), None)
    return loop.leaving if loop else next((value for value in body.inputs if value.type.rank == 3), None)


def _by_operation(node: Node | None, value: Value) -> list[str]:
    if node is None:
        return [value.name or "x"]
    if node.op.name == "rope_table":
        return [("cos", "sin")[node.outputs.index(value)]]
    if node.op.name == "token_take" and node.input(0).node is not None:
        return _by_operation(node.input(0).node, node.input(0))
    if node.op.name == "topk":
        return [("values", "indices")[node.outputs.index(value)]]
    if node.op.name in ("rms_norm", "layer_norm"):
        return ["normed"]
    if node.op.name in ("attention", "latent_attention"):
        return ["attended"]
    if node.op.name == "linear" and all(user.op.name == "slice" for user in value.users):
        return ["projected"]
    if node.op.name == "linear":
        last = node.scope.rpartition(".")[2]
        return [last.removesuffix("_proj") or "projected"]
    if node.op.name in HANDED_ON and node.op.name != "concat" and isinstance(node.input(0).node, Node):
        return _by_operation(node.input(0).node, node.input(0))
    return [MADE_BY.get(node.op.name, "x")]
