"""What every generated checkpoint has: a config, classes of modules, helpers, and tensors under their names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backends.torch_module.caches import cache_context, cache_helpers
from backends.torch_module.classes import ModuleClass
from backends.torch_module.code import names_in, wrapped
from backends.torch_module.model import Model
from backends.torch_module.module import ClassWriter
from backends.torch_module.packing import packed, shipped, tied_parts
from backends.torch_module.program import Body, Extras
from backends.torch_module.rendering import environment, field_of, render
from backends.torch_module.sparse import loading_code
from backends.torch_module.stacks import MEMORY, stack_config
from compiler.errors import TargetError
from compiler.ir.graph import Graph, Node, Param

HELPERS = (
    "RMSNorm",
    "OffsetRMSNorm",
    "RotaryEmbedding",
    "kernel_binary",
    "apply_rotary",
    "apply_interleaved_rotary",
    "apply_interleaved_rotary_to_half",
    "past_length",
    "token_positions",
    "causal_mask",
    "causal_masks",
    "padding_mask",
    "allowed",
    "decodes",
    "attention",
    "full_attention",
    "eager_attention",
    "latent_attention",
    "cross_states",
    "hadamard",
    "gelu_tanh",
    "fake_quantize",
    "low_rank",
    "unpack_codes",
    "PackedWeight",
    "PackedLinear",
    "PackedEmbedding",
    "PackedExperts",
    "shifts",
    "ShiftedLinear",
    "ShiftedEmbedding",
    "ShiftedExperts",
    "MixedExperts",
    "expert_linear",
    "run_experts",
    "run_clamped_experts",
    "LatentRotation",
    "pack",
    "unpack",
    "update_rounded",
    "update_latents",
)
"""Functions and classes that a module gets when it uses them, in the order of the file."""

CODEBOOK_HELPERS = ("CodebookWeight", "CodebookLinear", "CodebookEmbedding", "CodebookExperts")
"""The same, for weights that are looked up in tables."""

STACK_HELPERS = ("memory_bytes", "StackedWeight", "StackedLinear", "StackedEmbedding", "StackedModel")
"""The same, for weights that are sums of blocks."""

FLOAT_HELPERS = ("MxWeight", "MxLinear", "MxEmbedding", "MxExperts")
"""The same, for weights of small floats."""

TOKEN_HELPERS = (
    "token_scores",
    "block_scores",
    "select_tokens",
    "match_tokens",
    "take_tokens",
    "merge_tokens",
    "restore_tokens",
    "present_tokens",
    "prompt_scores",
    "select_prompt_tokens",
    "restore_prompt_tokens",
    "cached_places",
    "stage_places",
    "counted_places",
    "stage_mask",
)
"""The same, for operations on which tokens go on."""

HELPER_FILES = (
    ("codebooks.py.jinja", CODEBOOK_HELPERS),
    ("stacks.py.jinja", STACK_HELPERS),
    ("floats.py.jinja", FLOAT_HELPERS),
    ("helpers.py.jinja", HELPERS),
    ("tokens.py.jinja", TOKEN_HELPERS),
)

STACKED = ("memory_bytes", "StackedWeight", "StackedModel")
NEEDS = {
    "causal_mask": ("past_length",),
    "eager_attention": ("allowed",),
    "latent_attention": ("allowed", "attention"),
    "merge_tokens": ("take_tokens",),
    "restore_tokens": ("take_tokens",),
    "restore_prompt_tokens": ("take_tokens",),
    "stage_places": ("take_tokens", "cached_places"),
    "counted_places": ("cached_places",),
    "PackedLinear": ("PackedWeight",),
    "PackedEmbedding": ("PackedWeight", "unpack_codes"),
    "PackedExperts": ("PackedWeight", "expert_linear"),
    "ShiftedLinear": ("PackedWeight", "PackedLinear", "shifts"),
    "ShiftedEmbedding": ("PackedWeight", "PackedEmbedding", "unpack_codes"),
    "ShiftedExperts": ("PackedWeight", "PackedExperts", "expert_linear", "shifts"),
    "MixedExperts": ("PackedWeight", "PackedExperts", "expert_linear"),
    "CodebookLinear": ("CodebookWeight", "unpack_codes"),
    "CodebookEmbedding": ("CodebookWeight", "unpack_codes"),
    "CodebookExperts": ("CodebookWeight", "unpack_codes", "expert_linear"),
    "MxLinear": ("MxWeight",),
    "MxEmbedding": ("MxWeight",),
    "MxExperts": ("MxWeight", "expert_linear"),
    "StackedLinear": STACKED,
    "StackedEmbedding": STACKED,
}
OUTPUTS = {
    "BaseModelOutput",
    "BaseModelOutputWithPast",
    "BaseModelOutputWithPooling",
    "CausalLMOutputWithPast",
    "ImageClassifierOutput",
    "MaskedLMOutput",
    "Seq2SeqLMOutput",
    "Seq2SeqModelOutput",
    "SequenceClassifierOutput",
}
KERNELS = {
    "kernel_binary": ("binary", "BINARIES"),
    "PackedLinear": ("packed_linear", "packed_linear"),
    "PackedExperts": ("packed_linear", "packed_linear"),
    "CodebookLinear": ("table_linear", "table_linear"),
    "CodebookExperts": ("table_linear", "table_linear"),
    "dense": ("packed_dense", "packed_dense"),
    "latent_attention": ("latent_decode", "latent_decode"),
    "cached_decode": ("cached_decode", "cached_decode"),
    "low_rank": ("low_rank_linear", "low_rank_linear"),
}
"""For helpers the kernel files that they call, which checkpoints get, and what of them."""

DOCS = {
    "latent_attention": "Attention to keys and values that are made from one latent for each token, which is cached.",
    "attention": "Attention to the tokens before.",
    "experts": "Experts, of which each token visits some.",
    "embedding": "From tokens or places in the input to vectors.",
    "take": "From tokens or places in the input to vectors.",
    "conv": "From pixels or frames to vectors.",
    "topk": "Chooses experts for each token.",
    "linear": "Feed-forward, for each token by itself.",
}
"""What a class is, by the first of these operations that it has."""

INHERITED = ("id2label", "label2id", "problem_type")
"""Entries of the config that every config of transformers has."""

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "max_position_embeddings")


@dataclass(frozen=True)
class Generated:
    """A checkpoint with code. ``tensors`` maps names in the file to the graph's parameters."""

    architecture: str
    config: Mapping[str, Any]
    files: Mapping[str, str]
    tensors: Mapping[str, Param]

    @property
    def unpacked(self) -> dict[str, Param]:
        """The tensors that the code does not hold packed itself."""
        return {path: param for path, param in self.tensors.items() if packed(param) is None}


class Assembly:
    """The parts of a checkpoint. Kinds of models say what their top classes and their config are."""

    auto_classes: Mapping[str, str] = {}
    """From auto classes of transformers to the ends of our classes' names, the whole model's last."""

    def __init__(self, graph: Graph, model: Model, name: str, program: Body) -> None:
        self.graph = graph
        self.model = model
        self.name = name
        self.program = program
        self.tied = self._tied()
        self.tied_tensors = tied_parts(self.tied, model.layout.named())

    def top(self) -> str:
        """The classes that transformers loads."""
        raise NotImplementedError

    def own_config(self) -> dict[str, Any]:
        """Entries of the config besides sizes and what every model has."""
        return {}

    def helper_context(self) -> dict[str, Any]:
        """What templates of helpers need to know."""
        return cache_context(self.graph, self.model.cache_bits)

    def written_at_top(self) -> list[Body]:
        """The bodies that the top classes hold themselves."""
        return []

    def generated(self, compact: bool = False) -> Generated:
        """The files; with ``compact``, code that loads sparse weights from bits and values. Raises TargetError."""
        tensors = self._tensors()
        loading = loading_code(tensors, self.name) if compact else ""
        if compact and not loading:
            cause = "no weight is so sparse that bits and values of it are smaller"
            raise TargetError(cause, remedy="leave `sparse: compact` out")
        modeling = self._modeling(loading)
        config = self._config()
        prefix = self.model.prefix
        configuration = self._configuration(config, modeling)
        files = {f"modeling_{self.name}.py": modeling, f"configuration_{self.name}.py": configuration}
        for file, _ in self._kernels():
            files |= shipped(file)
        auto_map = {"AutoConfig": f"configuration_{self.name}.{prefix}Config"}
        auto_map |= {auto: f"modeling_{self.name}.{prefix}{end}" for auto, end in self.auto_classes.items()}
        architecture = f"{prefix}{list(self.auto_classes.values())[-1]}"
        whole = {**config, "model_type": self.name, "architectures": [architecture], "auto_map": auto_map}
        return Generated(architecture, whole, files, tensors)

    def _tensors(self) -> dict[str, Param]:
        named = self.model.layout.named()
        return {path: param for path, param in named.items() if path not in self.tied and not _from_config(path)}

    def _tied(self) -> dict[str, str]:
        """Further names of a parameter, with the name that it is stored under."""
        first: dict[Param, str] = {}
        tied: dict[str, str] = {}
        for path, param in self.model.layout.named().items():
            if not _from_config(path) and first.setdefault(param, path) != path:
                tied[path] = first[param]
        return tied

    def tied_inside(self) -> dict[str, str]:
        """Ties between weights of the model without its head."""
        within = {path: first for path, first in self.tied_tensors.items() if path.startswith("model.")}
        return {path.removeprefix("model."): first.removeprefix("model.") for path, first in within.items()}

    def _config(self) -> dict[str, Any]:
        source = self.graph.origin.config or {}
        kept = {name: source[name] for name in KEPT if source.get(name) is not None}
        tie = {"tie_word_embeddings": bool(self.tied)}
        stack = stack_config(self._tensors(), self.tied)
        return {"initializer_range": 0.02, **kept, **self.model.sizes.config(), **self.own_config(), **tie, **stack}

    @property
    def stacked(self) -> bool:
        """Whether weights are stacks of blocks."""
        return bool({"StackedLinear", "StackedEmbedding"} & self.model.helpers)

    def _configuration(self, config: dict[str, Any], modeling: str) -> str:
        """The source of the config class, which names the code it is for.

        A process that has loaded a model takes its class again for every config of an equal source: without the name
        a checkpoint of other code would run that of the first.
        """
        fields = [(name, *field_of(value)) for name, value in config.items() if name not in INHERITED]
        fields = [(name, "int | str" if name == MEMORY else kind, default) for name, kind, default in fields]
        source = self.graph.origin.architecture or self.graph.name
        context: dict[str, Any] = {"prefix": self.model.prefix, "model_type": self.name, "fields": fields}
        context["lists"] = any("field(" in default for _, _, default in fields)
        context["typed"] = any("Any" in names_in(kind) for _, kind, _ in fields)
        context["digest"] = hashlib.sha256(modeling.encode()).hexdigest()[:16]
        return render("configuration.py.jinja", source=source, **context) + "\n"

    def _modeling(self, loading: str) -> str:
        classes = "\n\n\n".join(self._classes())
        top = self.top()
        helpers = self._helpers()
        text = "\n\n\n".join(filter(None, [*helpers, loading, classes, top]))
        lines = f"{self._header(text)}\n\n\n{text}\n".split("\n")
        return "\n".join(piece for line in lines for piece in wrapped(line))

    def _classes(self) -> list[str]:
        done: list[ModuleClass] = []
        found: list[str] = []
        for module in self.model.classes.values():
            if module in done or module.first in self.written_at_top():
                continue
            done.append(module)
            layer = module.first.path.rpartition(".")[2].isdigit()
            base = "GradientCheckpointingLayer" if layer else "nn.Module"
            found.append(
                "\n".join(ClassWriter(self.model, module).source(base, _doc(module, layer, self.model.extras)))
            )
        return found

    def bare_classes(self) -> str:
        bare = self.model.layout.bare.items()
        packed = self.model.layout.schemes
        plain = {param: path for param, path in bare if param.type.dtype.is_floating_point and param not in packed}
        holders = {path.rpartition(".")[0] for path in plain.values()}
        names = sorted(
            {f"{self.model.prefix}{self.model.classes[path].name}" for path in holders if path in self.model.classes}
        )
        return " | ".join(names)

    def _helpers(self) -> list[str]:
        context = {"prefix": self.model.prefix, **self.helper_context()}
        used = self._used()
        stacks = [name for name in ("PackedExperts", "MixedExperts", "CodebookExperts", "MxExperts") if name in used]
        context |= {"packed_experts": " | ".join(stacks), "packed_dense": "dense" in used}
        context["packed_rows"] = "PackedEmbedding" in used
        found: list[str] = []
        for file, names in HELPER_FILES:
            module: Any = environment().get_template(file).make_module(context)
            found += [str(getattr(module, name)()).strip("\n") for name in names if name in used]
        return found

    def _used(self) -> set[str]:
        return {need for name in self.model.helpers for need in (name, *NEEDS.get(name, ()))}

    def _kernels(self) -> list[tuple[str, str]]:
        return sorted({kernel for helper, kernel in KERNELS.items() if helper in self._used()})

    def _header(self, text: str) -> str:
        return render(
            "header.py.jinja",
            prefix=self.model.prefix,
            name=self.name,
            used=names_in(text),
            kernels=self._kernels(),
            outputs=sorted(OUTPUTS & names_in(text)),
            source=self.graph.origin.architecture or self.graph.name,
        )


class CachedAssembly(Assembly):
    """The parts of a checkpoint whose model has a cache and a head."""

    def helper_context(self) -> dict[str, Any]:
        context = super().helper_context()
        self.model.helpers |= cache_helpers(self.graph, context)
        return context

    def _head(self) -> str:
        linears = [item for item in self.program.items if isinstance(item, Node) and item.op.name == "linear"]
        leaf = self.model.layout.leaves.get(linears[-1]) if linears else None
        return leaf.path if leaf else ""


def _from_config(path: str) -> bool:
    """Rotary frequencies are no tensors of the checkpoint."""
    return path.endswith(".inv_freq")


def _doc(module: ModuleClass, layer: bool, extras: Extras) -> str:
    if layer:
        return f"One layer of the stack; {len(module.bodies)} of them."
    nodes = [item for item in module.first.items if isinstance(item, Node)]
    found = next((doc for op, doc in DOCS.items() if any(node.op.name == op for node in nodes)), "")
    if module.first.loops():
        return "The layers, one after another."
    if any(node in extras.crossing for node in nodes):
        return "Attention to what the encoder makes, whose keys and values are made once."
    ahead = any(node.op.name == "attention" and not node.attr("causal") for node in nodes)
    return "Attention among tokens." if ahead else found or "A part of the model that only has parts."
