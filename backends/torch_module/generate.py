"""From a graph to the files of a checkpoint that carries its own code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from backends.torch_module.classes import ModuleClass, classes_of
from backends.torch_module.code import camel, identifier, names_in, wrapped
from backends.torch_module.layout import layout_of
from backends.torch_module.model_code import TopWriter, without_calls
from backends.torch_module.module import ClassWriter, Model
from backends.torch_module.prepare import POSITIONS, prepared
from backends.torch_module.program import ATTENTION, Body, Call, Extras, Loop, program_of
from backends.torch_module.sizes import sizes_of
from compiler.errors import TargetError
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import layer_of

TEMPLATES = Path(__file__).parent / "templates"
HELPERS = (
    "RMSNorm",
    "OffsetRMSNorm",
    "RotaryEmbedding",
    "apply_rotary",
    "apply_interleaved_rotary",
    "apply_interleaved_rotary_to_half",
    "token_positions",
    "causal_mask",
    "allowed",
    "attention",
    "eager_attention",
    "latent_attention",
    "gelu_tanh",
    "run_experts",
    "run_clamped_experts",
    "LatentRotation",
    "pack",
    "unpack",
    "RoundedLatentLayer",
    "SlidingLayer",
    "SlidingLatentLayer",
    "SlidingRoundedLatentLayer",
    "Cache",
)
"""Functions and classes that a module gets when it uses them, in the order of the file."""

NEEDS = {
    "eager_attention": ("allowed",),
    "latent_attention": ("allowed", "attention"),
    "gelu_tanh": (),
}
CACHE_LAYERS = {
    "window": "SlidingLayer",
    "latent window": "SlidingLatentLayer",
    "rounded": "RoundedLatentLayer",
    "rounded window": "SlidingRoundedLatentLayer",
}
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "max_position_embeddings")


@dataclass(frozen=True)
class Generated:
    """A checkpoint with code. ``tensors`` maps names in the file to the graph's parameters, ``tied`` further names."""

    architecture: str
    config: Mapping[str, Any]
    files: Mapping[str, str]
    tensors: Mapping[str, Param]


def generate(graph: Graph, *, cache_bits: int = 0) -> Generated:
    """The files for ``graph``, a causal language model. Raises TargetError when something in it has no code.

    ``cache_bits`` 8 or 4 rounds what latent attention caches. Reads no weight but rotary frequencies.
    """
    if cache_bits and not graph.nodes_named("latent_attention"):
        raise TargetError("a cache of fewer bits is for latent attention, of which the model has none")
    graph = prepared(graph, _tokens(graph))
    nodes, extras = list(graph.nodes), Extras()
    _add_extras(nodes, extras)
    body_path = _body_path(graph)
    layout = layout_of(graph, body_path, nodes)
    program = program_of(graph, nodes, layout, extras)
    inner = next((item.body for item in program.items if isinstance(item, Call) and item.name == "model"), None)
    loops = [item for item in inner.items if isinstance(item, Loop)] if inner else []
    if (
        inner is None
        or len(loops) != 1
        or any(isinstance(item, Call) and item.name != "model" for item in program.items)
    ):
        raise TargetError("a generated module is made of one stack of layers; this model has another structure")
    classes = classes_of(program, layout, extras)
    prefix, name = _names(graph)
    sizes = sizes_of(graph, layout, len(loops[0].layers))
    stacks = {f"{inner.path}.{loop.name}": loop for loop in loops}
    model = Model(prefix, layout, extras, sizes, classes, stacks, graph.sources, cache_bits)
    return _Assembly(graph, model, name, program, inner, loops[0]).generated()


def _tokens(graph: Graph) -> str:
    if list(graph.inputs) != ["input_ids"] or list(graph.outputs) != ["logits"]:
        raise TargetError(
            f"a generated module takes input_ids and makes logits; this model takes {', '.join(graph.inputs)} "
            f"and makes {', '.join(graph.outputs)}"
        )
    if any(not node.attr("causal") for node in graph.nodes_named(*ATTENTION)):
        raise TargetError("a generated module continues text; this model has attention that looks ahead")
    return "input_ids"


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
    prefix = re.sub(r"(ForCausalLM|LMHeadModel|Model)$", "", architecture)
    return f"Compressed{prefix}", f"compressed_{family}"


class _Assembly:
    def __init__(self, graph: Graph, model: Model, name: str, program: Body, inner: Body, loop: Loop) -> None:
        self.graph = graph
        self.model = model
        self.name = name
        self.program = program
        self.inner = inner
        self.loop = loop
        self.tied = self._tied()

    def generated(self) -> Generated:
        modeling = self._modeling()
        config = self._config()
        prefix = self.model.prefix
        files = {f"modeling_{self.name}.py": modeling, f"configuration_{self.name}.py": self._configuration(config)}
        auto_map = {
            "AutoConfig": f"configuration_{self.name}.{prefix}Config",
            "AutoModel": f"modeling_{self.name}.{prefix}Model",
            "AutoModelForCausalLM": f"modeling_{self.name}.{prefix}ForCausalLM",
        }
        architecture = f"{prefix}ForCausalLM"
        whole = {**config, "model_type": self.name, "architectures": [architecture], "auto_map": auto_map}
        return Generated(architecture, whole, files, self._tensors())

    def _tensors(self) -> dict[str, Param]:
        named = self.model.layout.named()
        return {path: param for path, param in named.items() if path not in self.tied and param.persistent}

    def _tied(self) -> dict[str, str]:
        """Further names of a parameter, with the name that it is stored under."""
        first: dict[Param, str] = {}
        tied: dict[str, str] = {}
        for path, param in self.model.layout.named().items():
            if param.persistent and first.setdefault(param, path) != path:
                tied[path] = first[param]
        return tied

    # --- config ----------------------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        source = self.graph.origin.config or {}
        kept = {name: source[name] for name in KEPT if source.get(name) is not None}
        windows = [self._window(layer) for layer in self.loop.layers]
        shown = {"attention_windows": windows} if any(windows) else {}
        tie = {"tie_word_embeddings": bool(self.tied)}
        bits = {"cache_bits": self.model.cache_bits} if self.model.cache_bits else {}
        sizes = self.model.sizes.config()
        return {"use_cache": True, "initializer_range": 0.02, **kept, **sizes, **shown, **bits, **tie}

    def _window(self, layer: Body) -> int | None:
        found = [item for body in layer.walk() for item in body.items if isinstance(item, Node)]
        windows = [node.attr("window") for node in found if node.op.name in ATTENTION]
        if len(windows) > 1:
            raise TargetError(
                f"{layer.path} attends {len(windows)} times, which a generated module's cache cannot hold"
            )
        return windows[0] or None if windows else None

    def _configuration(self, config: dict[str, Any]) -> str:
        fields = [(name, *_field(value)) for name, value in config.items()]
        lists = any("field(" in default for _, _, default in fields)
        source = self.graph.origin.architecture or self.graph.name
        context = {"prefix": self.model.prefix, "model_type": self.name, "fields": fields, "lists": lists}
        return _render("configuration.py.jinja", source=source, **context) + "\n"

    # --- modeling --------------------------------------------------------------------------------------------

    def _modeling(self) -> str:
        classes = "\n\n\n".join(self._classes())
        top = self._top()
        helpers = self._helpers()
        text = "\n\n\n".join([*helpers, classes, top])
        lines = f"{self._header(text)}\n\n\n{text}\n".split("\n")
        return "\n".join(piece for line in lines for piece in wrapped(line))

    def _classes(self) -> list[str]:
        done: list[ModuleClass] = []
        found: list[str] = []
        for module in self.model.classes.values():
            if module in done or module.first is self.inner:
                continue
            done.append(module)
            layer = module.first in self.loop.layers or module.name.endswith("DecoderLayer")
            base = "GradientCheckpointingLayer" if layer else "nn.Module"
            found.append("\n".join(ClassWriter(self.model, module).source(base, _doc(module, layer))))
        return found

    def _top(self) -> str:
        extras, prefix = self.model.extras, self.model.prefix
        tokens = self.graph.inputs["input_ids"]
        names = {tokens: "input_ids", self.graph.inputs[POSITIONS]: POSITIONS, extras.cache: "past_key_values"}
        names |= dict.fromkeys(extras.masks.values(), "mask")
        body = TopWriter(self.model, self.inner, names)
        lines, result = body.statements()
        self.model.helpers |= {"Cache", "causal_mask"}
        before = self._before(lines)
        head = TopWriter(self.model, without_calls(self.program), {self.inner.outputs[0]: "hidden_states"})
        head_lines, head_result = head.statements()
        body_init, head_init = body.init_statements(), head.init_statements()
        return _render(
            "causal_lm.py.jinja",
            prefix=prefix,
            no_split=_strings(sorted({f"{prefix}{self.model.classes[x.path].name}" for x in self.loop.layers})),
            rotary="RotaryEmbedding" in self.model.helpers,
            rotation="LatentRotation" in self.model.helpers,
            bare=self._bare_classes(),
            body_init=body_init,
            body_forward=[*before, *lines],
            body_result=result,
            embedding=self._embedding(tokens),
            head_init=head_init,
            head_forward=head_lines,
            head_result=head_result,
            head=self._head(),
            tied=_mapping(self.tied),
        )

    def _before(self, lines: list[str]) -> list[str]:
        """Statements that make positions and the mask."""
        found: list[str] = []
        if "position_ids" in names_in("\n".join(lines)):
            self.model.helpers.add("token_positions")
            found += [
                "if position_ids is None:",
                "    past = past_key_values.get_seq_length() if past_key_values is not None else 0",
                "    position_ids = token_positions(input_ids, attention_mask, past)",
            ]
        masks = self.model.extras.masks
        if len(masks) == 1:
            extra = ", 0, self.config.attention_windows[0]" if 0 not in masks else ""
            found.append(f"mask = causal_mask(input_ids, attention_mask, past_key_values{extra})")
        return found

    def _bare_classes(self) -> str:
        holders = {path.rpartition(".")[0] for path in self.model.layout.bare.values()}
        names = sorted(
            {f"{self.model.prefix}{self.model.classes[path].name}" for path in holders if path in self.model.classes}
        )
        return " | ".join(names)

    def _embedding(self, tokens: Value) -> str:
        node = next((user for user in tokens.users if user.op.name == "embedding"), None)
        leaf = self.model.layout.leaves.get(node) if node else None
        return leaf.path.removeprefix("model.") if leaf else ""

    def _head(self) -> str:
        linears = [item for item in self.program.items if isinstance(item, Node) and item.op.name == "linear"]
        leaf = self.model.layout.leaves.get(linears[-1]) if linears else None
        return leaf.path if leaf else ""

    def _helpers(self) -> list[str]:
        used = set(self.model.helpers)
        for name in list(used):
            used.update(NEEDS.get(name, ()))
        softcap = any(node.attr("softcap") for node in self.graph.nodes_named("latent_attention"))
        if softcap and "latent_attention" in used:
            used.add("eager_attention")
        kinds = self._cache_kinds()
        used |= {name for kind, name in CACHE_LAYERS.items() if kind in kinds}
        template = _environment().get_template("helpers.py.jinja")
        context = {
            "prefix": self.model.prefix,
            "latent_softcap": softcap,
            "cache_doc": self._cache_doc(),
            "cache_kinds": kinds,
            "cache_bits": self.model.cache_bits,
            "rank": self._rank_of_layer(),
        }
        module: Any = template.make_module(context)
        return [str(getattr(module, name)()).strip("\n") for name in HELPERS if name in used]

    def _cache_kinds(self) -> list[str]:
        """What layers of the cache there may be."""
        latent = {bool(node.attr("window")) for node in self.graph.nodes_named("latent_attention")}
        plain = {bool(node.attr("window")) for node in self.graph.nodes_named("attention")}
        kinds = ["window"] if True in latent | plain else []
        kinds += ["rounded"] if self.model.cache_bits and False in latent else []
        kinds += ["rounded window"] if self.model.cache_bits and True in latent else []
        kinds += ["latent window"] if True in latent else []
        kinds += ["plain window"] if True in plain else []
        return kinds or ["full"]

    def _rank_of_layer(self) -> str:
        """What is true of layers with a latent, as code; "" where all layers have one."""
        mixed = self.graph.nodes_named("attention") and self.graph.nodes_named("latent_attention")
        return "config.kv_lora_rank[index]" if mixed else ""

    def _cache_doc(self) -> str:
        latent = bool(self.graph.nodes_named("latent_attention"))
        plain = bool(self.graph.nodes_named("attention"))
        held = " or ".join([*(["keys and values"] if plain else []), *(["latents and rotary keys"] if latent else [])])
        return f"Past tokens' {held}; of layers with a window only those within it."

    def _header(self, text: str) -> str:
        return _render(
            "header.py.jinja",
            prefix=self.model.prefix,
            name=self.name,
            used=names_in(text),
            source=self.graph.origin.architecture or self.graph.name,
        )


def _doc(module: ModuleClass, layer: bool) -> str:
    count = len(module.bodies)
    ops = {item.op.name for body in module.first.walk() for item in body.items if isinstance(item, Node)}
    if layer:
        return f"One layer of the stack; {count} of them."
    if "latent_attention" in ops:
        return "Attention to keys and values that are made from one latent for each token, which is what is cached."
    if "attention" in ops:
        return "Attention to the tokens before."
    return (
        "Experts, of which each token visits some." if "experts" in ops else "Feed-forward, for each token by itself."
    )


def _field(value: Any) -> tuple[str, str]:
    """The type and the default of a config entry."""
    if isinstance(value, list):
        return f"list[{_item_type(value)}]", "field(default_factory=list)"
    kind = type(value).__name__
    return (kind, f'"{value}"') if isinstance(value, str) else (kind, repr(value))


def _item_type(values: list[Any]) -> str:
    inner = {f"list[{_item_type(value)}]" if isinstance(value, list) else type(value).__name__ for value in values}
    return " | ".join([*sorted(inner - {"NoneType"}), *(["None"] if "NoneType" in inner else [])])


def _strings(values: list[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"


def _mapping(values: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'"{key}": "{value}"' for key, value in values.items()) + "}" if values else ""


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )


def _render(template: str, **context: Any) -> str:
    return _environment().get_template(template).render(**context).rstrip("\n")
