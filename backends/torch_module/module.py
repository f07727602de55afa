"""The source of one class of a modeling file: its ``__init__`` and ``forward``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backends.torch_module.classes import ModuleClass
from backends.torch_module.code import call, identifier
from backends.torch_module.forward import Context, Forward
from backends.torch_module.layout import Leaf, below
from backends.torch_module.model import Model
from backends.torch_module.packing import SCHEME, Scheme, ShiftedScheme, module_of, scheme_name
from backends.torch_module.program import Body, Call, Item, Loop
from backends.torch_module.quantities import HINTS, OPERAND_SIZES, WORDS, heads_of, is_size, known, number_at, word
from backends.torch_module.sizes import frequencies_name, likely
from compiler.errors import TargetError
from compiler.ir.graph import Node, Param, Value
from compiler.ir.layers import layer_of

TYPES = {"attention_mask": "torch.Tensor | None", "encoder_attention_mask": "torch.Tensor | None"}


class ClassWriter:
    """Writes ``__init__`` and ``forward`` of one class."""

    def __init__(self, model: Model, module: ModuleClass) -> None:
        self.model = model
        self.module = module
        self.part = model.layout.part(module.first.path)
        self.layered = any(layer_of(body.path) is not None for body in module.bodies)
        self.attributes: dict[str, str] = {}
        if any(isinstance(item, Node) and item.op.name in ("attention", "latent_attention") for item in self._items()):
            self.attributes["layer_idx"] = "layer_idx"
        if any(isinstance(item, Node) and item in model.extras.choosing for item in self._items()):
            self.attributes["layer_idx"] = "layer_idx"
        latent = any(isinstance(item, Node) and item.op.name == "latent_attention" for item in self._items())
        if model.cache_bits and any(isinstance(item, Node) and _cached(item) for item in self._items()):
            self.attributes["config"] = "config"
        self.rotation = "self.latent_rotation" if latent and model.cache_bits else ""

    def _items(self) -> list[Item]:
        return self.module.first.items

    def source(self, base: str, doc: str) -> list[str]:
        """The whole class."""
        forward = self.forward_lines()
        return [
            f"class {self.model.prefix}{self.module.name}({base}):",
            f'    """{doc}"""',
            "",
            *self.init_lines(),
            "",
            *forward,
        ]

    # --- forward -------------------------------------------------------------------------------------------

    def forward_lines(self) -> list[str]:
        body = self.module.first
        arguments = self.model.arguments(body)
        names = {value: name for name, value in arguments if value is not None}
        forward = Forward(body, names, self.context())
        lines = forward.statements()
        results = ", ".join(forward.result(value) for value in body.outputs)
        shown = [f"{name}: {self._annotation(name)}" for name, _ in arguments]
        returned = "torch.Tensor" if len(body.outputs) == 1 else "tuple[torch.Tensor, ...]"
        head = call(4, "def forward(", ["self", *shown], f") -> {returned}:")
        return [*head, *(f"        {line}" for line in lines), f"        return {results}"]

    def _annotation(self, name: str) -> str:
        base = name.rstrip("0123456789").rstrip("_")
        if base == "past_key_values":
            return "EncoderDecoderCache | None" if self.model.paired else "Cache | None"
        return TYPES.get(base, "torch.Tensor")

    def context(self) -> Context:
        return Context(
            parameter=self._parameter,
            leaf=self._leaf,
            weight=self._weight,
            dense=self._dense,
            held=lambda node: list(leaf.weights.values()) if (leaf := self.model.layout.leaves.get(node)) else [],
            size=self._size,
            helper=self._helper,
            arguments=lambda item: [value for _, value in self.model.arguments(item.body)],
            loop=self.loop_lines,
            rotation=self.rotation,
            cache=f"past_key_values{'.self_attention_cache' if self.model.paired else ''}",
            bits="self.config.cache_bits" if self.model.cache_bits else "",
            extras=self.model.extras,
        )

    def loop_lines(self, loop: Loop, names: dict[Value, str]) -> list[str]:
        """The layers one after another; where they read different values, each what the config says."""
        arguments = [self.model.arguments(layer) for layer in loop.layers]
        labels = [name for name, _ in arguments[0]]
        columns = [{value for _, value in column if value is not None} for column in zip(*arguments, strict=True)]
        columns = [{names.get(value, "") for value in column} - {""} for column in columns]
        shown = {label: column.copy().pop() for label, column in zip(labels, columns, strict=True)}
        shown["hidden_states"] = names[loop.entering]
        varying = [i for i, column in enumerate(columns) if len(column) > 1 and labels[i] != "hidden_states"]
        if not varying:
            return [
                f"for layer in {self.run_of(loop)}:",
                f"    {shown['hidden_states']} = layer({', '.join(shown.values())})",
            ]
        rows = [tuple(_named_in(names, layer[i][1]) for i in varying) for layer in arguments]
        shown |= {labels[i]: labels[i] for i in varying}
        return self._chosen(loop, rows, [labels[i] for i in varying], shown)

    def run_of(self, loop: Loop) -> str:
        """The layers of ``loop`` as code."""
        stop, path = loop.first + len(loop.layers), loop.layers[0].path.rpartition(".")[0]
        whole = len(self.model.stacks[path].layers)
        if len(loop.layers) == whole:
            return f"self.{loop.name}"
        return f"self.{loop.name}[{loop.first or ''}:{'' if stop == whole else stop}]"

    def _chosen(self, loop: Loop, rows: list[tuple[str, ...]], labels: list[str], shown: dict[str, str]) -> list[str]:
        """Layers of which each is given one of several choices of some arguments."""
        distinct = list(dict.fromkeys(rows))
        for layer, row in zip(loop.layers, rows, strict=True):
            self.model.sizes.note("layer_inputs", layer.path, distinct.index(row))
        self.attributes["layer_inputs"] = self._list("layer_inputs")
        end = "," if len(labels) == 1 else ""
        return [
            *call(0, "choices = (", [f"({', '.join(row)}{end})" for row in distinct]),
            f"for layer, choice in zip(self.{loop.name}, self.layer_inputs, strict=True):",
            f"    {', '.join(labels)}{end} = choices[choice]",
            f"    {shown['hidden_states']} = layer({', '.join(shown.values())})",
        ]

    def _helper(self, name: str) -> str:
        self.model.helpers.add(name)
        return name

    def _relative(self, path: str) -> str:
        base = self.module.first.path
        if not below(path, base):
            raise TargetError(f"{path} is used in {base or 'the model'}, outside of the module that holds it")
        return f"self.{path.removeprefix(base).lstrip('.')}"

    def _parameter(self, param: Param) -> str:
        for leaf in self.model.layout.leaves.values():
            for name, held in leaf.weights.items():
                if held is param and param not in self.model.layout.bare:
                    return self._tensor(leaf, name)
        return self._relative(self.model.layout.bare[param])

    def _leaf(self, node: Node) -> str | None:
        leaf = self.model.layout.leaves.get(node)
        return None if leaf is None else self._relative(leaf.path)

    def _weight(self, node: Node) -> str | None:
        leaf = self.model.layout.leaves.get(node)
        return None if leaf is None else self._tensor(leaf, "weight")

    def _dense(self, node: Node) -> str | None:
        leaf = self.model.layout.leaves.get(node)
        if leaf is None or leaf.op != "linear" or leaf.weights["weight"] in self.model.layout.schemes:
            return None
        return self._relative(leaf.path) if below(leaf.path, self.module.first.path) else None

    def _tensor(self, leaf: Leaf, name: str) -> str:
        """A parameter of a leaf as a tensor: made of its codes where they are packed."""
        path = self._relative(leaf.path)
        if leaf.weights[name] not in self.model.layout.schemes:
            return f"{path}.{name}"
        if isinstance(self.model.layout.schemes[leaf.weights[name]], Scheme | ShiftedScheme):
            self._helper("dense")
        return f"{path}.dense()"

    def _size(self, index: int, name: str, place: int | None) -> str:
        """A number at item ``index``: the same everywhere, an expression of quantities, or a quantity of its own."""
        values = {body.path: number_at(body.items[index], name, place) for body in self.module.bodies}
        item = self._items()[index]
        distinct = set(values.values())
        if name == "scale":
            return self._scale(values)
        if len(distinct) == 1 and not is_size(item, name):
            return str(distinct.pop())
        hints = HINTS.get(name) or heads_of(item)
        return self._attribute(values, hints, WORDS.get(name) or f"{word(item)}_{name}")

    def _scale(self, values: dict[str, Any]) -> str:
        hints = ("head_dim**-0.5", "(qk_nope_head_dim + qk_rope_head_dim) ** -0.5")
        expression = self.model.sizes.expression(values, hints)
        if expression is None and len(set(values.values())) == 1:
            self.attributes["scaling"] = repr(next(iter(values.values())))
        else:
            self.attributes["scaling"] = self._reference(expression or self._own(values, "attention_scale"))
        return "self.scaling"

    def _attribute(self, values: dict[str, Any], hints: tuple[str, ...], word: str) -> str:
        expression = self.model.sizes.expression(values, hints)
        if expression is None and len(set(values.values())) == 1:
            return str(next(iter(values.values())))
        expression = expression or self._own(values, word)
        name = expression if expression.isidentifier() else word
        self.attributes[name] = self._reference(expression)
        return f"self.{name}"

    def _reference(self, expression: str) -> str:
        return self.model.sizes.reference(expression, self.part)

    def _list(self, name: str) -> str:
        """An entry of the config that has something for each layer of the part that this class is in."""
        return f"config.{self.part}_{name}" if self.part else f"config.{name}"

    def _own(self, values: dict[str, Any], word: str) -> str:
        """A new quantity for numbers that no expression of known ones gives."""
        sizes = self.model.sizes
        word = identifier(word)
        name = next(
            n for n in (word, *(f"{word}_{i}" for i in range(2, 99))) if not known(sizes, sizes.known(n, self.part))
        )
        for path, value in values.items():
            sizes.note(name, path, value)
        return name

    # --- __init__ ------------------------------------------------------------------------------------------

    def init_lines(self) -> list[str]:
        statements = self.init_statements()
        index = ", layer_idx: int" if self.layered else ""
        head = f"    def __init__(self, config: {self.model.prefix}Config{index}) -> None:"
        return [head, "        super().__init__()", *statements]

    def init_statements(self) -> list[str]:
        """The statements of ``__init__`` after that of the base class."""
        children = [line for lines in [*self._children(), *self._stacks()] for line in lines]
        return [*(f"        self.{name} = {code}" for name, code in self.attributes.items()), *children]

    def _stacks(self) -> list[list[str]]:
        path = self.module.first.path
        held = [stack for place, stack in self.model.stacks.items() if place == f"{path}.{stack.name}".lstrip(".")]
        return [self._stack(stack) for stack in held]

    def _stack(self, loop: Loop) -> list[str]:
        classes = _distinct(self.model, loop)
        prefix = self.model.prefix
        if len(classes) == 1:
            count = self._reference("num_hidden_layers")
            layer = f"{prefix}{classes[0].name}(config, layer_idx) for layer_idx in range({count})"
            return [f"        self.{loop.name} = nn.ModuleList({layer})"]
        entries = [f'"{module.name}": {prefix}{module.name}' for module in classes]
        lines = call(8, "kinds = {", entries, "}")
        layer = f"kinds[kind](config, layer_idx) for layer_idx, kind in enumerate({self._list('layer_kinds')})"
        for body in loop.layers:
            self.model.sizes.note("layer_kinds", body.path, self.model.classes[body.path].name)
        return [*lines, f"        self.{loop.name} = nn.ModuleList({layer})"]

    def _children(self) -> Iterator[list[str]]:
        if self.rotation:
            self.model.helpers.add("LatentRotation")
            rank = self._reference("kv_lora_rank")
            yield [f"        {self.rotation} = {self.model.prefix}LatentRotation({rank})"]
        done: set[str] = set()
        for index, item in enumerate(self._items()):
            if isinstance(item, Call) and "[" in item.name:
                continue  # a layer, which the stack has
            if isinstance(item, Call):
                arguments = "config, layer_idx" if layer_of(item.body.path) else "config"
                name = self.model.classes[item.body.path].name
                yield [f"        self.{item.name} = {self.model.prefix}{name}({arguments})"]
            elif isinstance(item, Node):
                yield from self._held(index, item, done)

    def _held(self, index: int, node: Node, done: set[str]) -> Iterator[list[str]]:
        leaf = self.model.layout.leaves.get(node)
        if leaf is not None and leaf.path not in done:
            done.add(leaf.path)
            made = self._constructed(index, leaf)
            yield call(8, f"{self._relative(leaf.path)} = {made[0]}(", made[1])
        for position, value in enumerate(node.inputs):
            path = self.model.layout.bare.get(value) if isinstance(value, Param) else None
            if path is not None and path not in done:
                done.add(path)
                yield self._bare(path, index, position)

    def _bare(self, path: str, index: int, position: int) -> list[str]:
        """The statement that makes a parameter, a stack of packed ones, or a buffer of numbers that do not learn."""
        param = self._items_param(self.module.first, index, position)
        name, shape = self._relative(path), self._shape(index, position)
        if param in self.model.layout.schemes:
            made = self._helper(module_of("experts", self.model.layout.schemes[param]))
            return call(8, f"{name} = {made}(", [*shape, self._scheme(path, index, position)])
        made = f"torch.empty({', '.join(shape) or '()'}"
        if param.type.dtype.is_floating_point:
            return [f"        {name} = nn.Parameter({made}))"]
        return [f'        self.register_buffer("{name.removeprefix("self.")}", {made}, dtype={param.type.dtype}))']

    def _scheme(self, path: str, index: int, position: int) -> str:
        """How the weight of ``path`` is packed, as arguments."""
        held = {body.path: self._items_param(body, index, position) for body in self.module.bodies}
        values = {body: self.model.layout.schemes[param]._asdict() for body, param in held.items()}
        known = {body: self.model.sizes.at(body) for body in values}
        choices = (name for name in (SCHEME, scheme_name(path)) if all(known[b].get(name) == values[b] for b in values))
        return f"**{self._reference(next(choices, None) or self._own(values, scheme_name(path)))}"

    def _shape(self, index: int, position: int) -> list[str]:
        rank = self._items_param(self.module.first, index, position).type.rank
        item = self._items()[index]
        hints = OPERAND_SIZES.get((item.op.name, position), ()) if isinstance(item, Node) else ()
        return [self._dimension(index, position, axis, hints[axis : axis + 1]) for axis in range(rank)]

    def _items_param(self, body: Body, index: int, position: int) -> Param:
        item = body.items[index]
        value = item.inputs[position] if isinstance(item, Node) else None
        if not isinstance(value, Param):
            raise TargetError(f"{body.path} has no parameter where others of its class have one")
        return value

    def _dimension(self, index: int, position: int, axis: int, hints: tuple[str, ...]) -> str:
        """One size of a parameter, as code within ``__init__``."""
        values: dict[str, Any] = {
            body.path: self._items_param(body, index, position).type.static_shape[axis] for body in self.module.bodies
        }
        expression = self.model.sizes.expression(values, hints)
        if expression is None and len(set(values.values())) == 1:
            return str(next(iter(values.values())))
        param = self._items_param(self.module.first, index, position)
        word = "_".join(param.name.split(".")[-3:-1]) + f"_size_{axis}"
        return self._reference(expression or self._own(values, word))

    def _constructed(self, index: int, leaf: Leaf) -> tuple[str, list[str]]:
        """The class of a leaf and its arguments."""
        node = self._items()[index]
        assert isinstance(node, Node)
        first = next(iter(leaf.weights.values()))
        rows, columns = likely(self.model.sizes.roles.get(first, set()))
        scheme = self.model.layout.schemes.get(first)
        match leaf.op:
            case "linear" | "latent_attention":
                position = 1 if leaf.op == "linear" else 3
                width = self._dimension(index, position, 1, tuple(columns))
                height = self._dimension(index, position, 0, tuple(rows))
                biased = "bias" in leaf.weights
                if scheme is not None:
                    bias = ["bias=True"] if biased else []
                    packed = self._helper(module_of(leaf.op, scheme))
                    return packed, [width, height, self._scheme(leaf.path, index, position), *bias]
                return "nn.Linear", [width, height, f"bias={biased}"]
            case "embedding":
                shape = [self._dimension(index, 0, axis, tuple((rows, columns)[axis])) for axis in (0, 1)]
                if scheme is not None:
                    return self._helper(module_of(leaf.op, scheme)), [*shape, self._scheme(leaf.path, index, 0)]
                return "nn.Embedding", shape
            case "rms_norm":
                self.model.helpers.add("OffsetRMSNorm" if node.attr("offset") else "RMSNorm")
                offset = [f"offset={node.attr('offset')}"] if node.attr("offset") else []
                name = f"{self.model.prefix}{'Offset' if offset else ''}RMSNorm"
                return name, [self._dimension(index, 1, 0, ()), f"eps={node.attr('eps')}", *offset]
            case "layer_norm":
                bias = [] if "bias" in leaf.weights else ["bias=False"]
                return "nn.LayerNorm", [self._dimension(index, 1, 0, ()), f"eps={node.attr('eps')}", *bias]
            case "rope_table":
                self.model.helpers.add("RotaryEmbedding")
                return f"{self.model.prefix}RotaryEmbedding", self._rotary(leaf, node)
            case _:
                return self._convolution(leaf, node)

    def _rotary(self, leaf: Leaf, node: Node) -> list[str]:
        scale = node.attr("scale")
        shown = [f"scale={scale}"] if scale != 1.0 else []
        return [self._reference(frequencies_name(leaf)), *shown]

    def _convolution(self, leaf: Leaf, node: Node) -> tuple[str, list[str]]:
        rows, inner, *kernel = leaf.weights["weight"].type.static_shape
        groups = node.attr("groups")
        options = [f"{name}={_plain(node.attr(name))}" for name in ("stride", "padding", "dilation")]
        defaults = {"stride=1", "padding=0", "dilation=1"}
        shown = [option for option in options if option not in defaults]
        shown += [f"groups={groups}"] if groups != 1 else []
        bias = [] if "bias" in leaf.weights else ["bias=False"]
        size = f"kernel_size={_plain(tuple(kernel))}"
        return f"nn.Conv{len(kernel)}d", [str(inner * groups), str(rows), size, *shown, *bias]


def _distinct(model: Model, loop: Loop) -> Sequence[ModuleClass]:
    found: list[ModuleClass] = []
    for layer in loop.layers:
        if model.classes[layer.path] not in found:
            found.append(model.classes[layer.path])
    return found


def _named_in(names: Mapping[Value, str], value: Value | None) -> str:
    return names[value] if value is not None else "None"


def _plain(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else str(values)


def _cached(node: Node) -> bool:
    """Whether what ``node`` attends to is cached token by token."""
    return node.op.name in ("attention", "latent_attention") and node.attr("causal")
