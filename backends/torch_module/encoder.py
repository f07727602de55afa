"""Models without a cache: encoders of tokens or images, with or without a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.torch_module.assembly import Assembly
from backends.torch_module.code import call
from backends.torch_module.model_code import TopWriter
from backends.torch_module.program import ATTENTION, Extras
from backends.torch_module.rendering import mapping, render, strings
from compiler.errors import TargetError
from compiler.ir.facts import image_size
from compiler.ir.graph import Graph, Value

OUTPUTS = {
    "ForMaskedLM": "MaskedLMOutput",
    "ForSequenceClassification": "SequenceClassifierOutput",
    "ForImageClassification": "ImageClassifierOutput",
    "Model": "BaseModelOutputWithPooling",
}
"""What a class returns, by the end of its name."""

LOSSES = {
    "ForMaskedLM": "self.loss_function(logits, labels, vocab_size=self.config.vocab_size)",
    "ForSequenceClassification": "self.loss_function(labels=labels, pooled_logits=logits, config=self.config)",
    "ForImageClassification": "self.loss_function(labels=labels, pooled_logits=logits, config=self.config)",
}
KEPT = ("id2label", "label2id", "problem_type", "image_size", "num_channels")


def ending(graph: Graph) -> str:
    """The end of the class's name, which says what it returns. Raises TargetError for a kind that is not known."""
    architecture = graph.origin.architecture or ""
    found = next((end for end in OUTPUTS if architecture.endswith(end)), "")
    if not found:
        raise TargetError(f"a {architecture or graph.name} has outputs that no generated module has")
    return found


def add_masks(graph: Graph, extras: Extras) -> None:
    """A mask for attention over tokens; images have no padding."""
    length = graph.inputs["input_ids"].shape[1] if "input_ids" in graph.inputs else None
    for node in graph.nodes_named(*ATTENTION):
        if node.input(1).shape[2] == length:
            key = ~node.attr("window") if node.attr("causal") else node.attr("window")  # inverted: causal
            extras.of_node[node] = [extras.masks.setdefault(key, Value(f"mask_{key}", extras.cache.type))]
        elif node.attr("window") or node.attr("causal"):
            raise TargetError(
                "its attention is masked, and masks of generated encoders are over tokens", where=node.scope
            )


class EncoderAssembly(Assembly):
    """One class that computes the whole graph."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.ending = ending(self.graph)
        self.auto_classes: Mapping[str, str] = {f"AutoModel{self.ending.removesuffix('Model')}": self.ending}

    def own_config(self) -> dict[str, Any]:
        source = {**(self.graph.origin.config or {}), **image_size(self.graph)}
        return {name: source[name] for name in KEPT if source.get(name) is not None}

    def top(self) -> str:
        masks, prefix = self.model.extras.masks, self.model.prefix
        names = {value: name for name, value in self.graph.inputs.items()}
        names |= {mask: _mask_name(key) for key, mask in masks.items()}
        writer = TopWriter(self.model, self.program, names)
        lines, results = writer.all_statements(self.graph.outputs)
        init = writer.init_statements()
        before = [line for key in masks for line in self._mask_lines(key)]
        tokens = "input_ids" in self.graph.inputs
        shown = [f"{name}: torch.Tensor" for name in self.graph.inputs]
        shown += ["attention_mask: torch.Tensor | None = None"] if tokens else []
        shown += ["labels: torch.Tensor | None = None"] if self.ending in LOSSES else []
        returned = f") -> {OUTPUTS[self.ending]}:"
        return render(
            "encoder.py.jinja",
            prefix=prefix,
            binaries="kernel_binary" in self.model.helpers,
            stacked=self.stacked,
            ending=self.ending,
            main_input=next(iter(self.graph.inputs)),
            output=OUTPUTS[self.ending],
            no_split=strings(self._layer_classes()),
            rotary="RotaryEmbedding" in self.model.helpers,
            bare=self.bare_classes(),
            init=init,
            signature=call(4, "def forward(", ["self", *shown, "**kwargs: Any"], returned),
            forward=[*before, *lines],
            results=results,
            loss=LOSSES.get(self.ending, ""),
            tied=mapping(self.tied_tensors),
        )

    def _layer_classes(self) -> list[str]:
        bodies = [layer for loop in self.model.stacks.values() for layer in loop.layers]
        return sorted({f"{self.model.prefix}{self.model.classes[body.path].name}" for body in bodies})

    def _mask_lines(self, key: int) -> list[str]:
        if key < 0:
            self.model.helpers.add("causal_mask")
            window = f", window={~key}" if ~key else ""
            return [f"{_mask_name(key)} = causal_mask(input_ids, attention_mask, None{window})"]
        self.model.helpers.add("padding_mask")
        window = f", {key}" if key else ""
        return [f"{_mask_name(key)} = padding_mask(input_ids, attention_mask{window})"]


def _mask_name(key: int) -> str:
    name, window = ("causal", ~key) if key < 0 else ("mask", key)
    return f"{name}_{window}" if window else name
