"""Encoder-decoders: an encoder of tokens or features, and a decoder with a cache that attends to what it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backends.torch_module.assembly import CachedAssembly
from backends.torch_module.caches import first_cached
from backends.torch_module.code import names_in
from backends.torch_module.layout import Layout, parent
from backends.torch_module.model import Model
from backends.torch_module.model_code import TopWriter, without_call
from backends.torch_module.program import ATTENTION, NOTHING, Body, Call, Extras, Loop
from backends.torch_module.rendering import mapping, render, strings
from compiler.errors import TargetError
from compiler.ir.graph import Graph, Node, Value, ancestors
from compiler.ir.layers import layer_of
from compiler.ir.positions import POSITIONS
from compiler.ir.relative import KEYS, QUERIES, biases

DECODER = "decoder_input_ids"
KEPT = ("decoder_start_token_id", "num_mel_bins")


def is_paired(graph: Graph) -> bool:
    """Whether the graph is an encoder and a decoder that scores its next token."""
    return len(graph.inputs) == 2 and list(graph.inputs)[1] == DECODER and next(iter(graph.outputs)) == "logits"


def decoded(graph: Graph) -> list[Node]:
    """The operations that depend on the decoder's tokens."""
    reached, found = {graph.inputs[DECODER]}, list[Node]()
    for node in graph.nodes:
        if reached.intersection(value for value in node.inputs if value is not None):
            reached.update(node.outputs)
            found.append(node)
    return found


def written(graph: Graph) -> list[Node]:
    """The operations of the decoder that are done for every token: all but the biases, which follow from places."""
    length, reached = graph.inputs[DECODER].shape[1], set(decoded(graph))
    apart = {node for bias in biases(graph, causal=True) for node in ancestors([bias])}
    made = [node for node in graph.nodes if any(length in output.shape for output in node.outputs)]
    return [*reached, *(node for node in made if node not in reached | apart)]


def add_extras(graph: Graph, extras: Extras) -> None:
    """Masks, where tokens are masked, and the cache. Raises TargetError for attention with a window."""
    tokens = "input_ids" in graph.inputs
    padding, across = Value("mask", NOTHING), Value("encoder_mask", NOTHING)
    extras.named = {bias: "position_bias" for causal in (True, False) for bias in biases(graph, causal=causal)}
    extras.named |= {padding: "attention_mask", across: "encoder_attention_mask"} if tokens else {}
    writing = set(decoded(graph))
    for node in graph.nodes_named(*ATTENTION):
        if node.attr("window"):
            cause = "a generated encoder-decoder has no windows, and this attention has one"
            raise TargetError(cause, where=node.scope)
        if node not in writing:
            extras.of_node[node] = [padding] if tokens else []
        elif node.attr("causal"):
            extras.of_node[node] = [extras.masks.setdefault(0, Value("mask_0", NOTHING)), extras.cache]
        else:
            extras.of_node[node] = [*([across] if tokens else []), extras.cache]
            extras.crossing.add(node)


def parts_of(graph: Graph) -> dict[str, str]:
    """The modules of the encoder and of the decoder, by the names of their stacks, and what each is."""
    writing = set(decoded(graph))
    found: dict[str, str] = {}
    for node in graph.nodes:
        layer = layer_of(node.scope)
        if layer is not None and (node in writing or node.op.name in ATTENTION):
            found.setdefault(parent(layer.stack), "decoder" if node in writing else "encoder")
    if sorted(found.values()) != ["decoder", "encoder"] or len({parent(path) for path in found}) != 1:
        raise TargetError("a generated module is made of one encoder and one decoder, each with attention; this is not")
    return found


@dataclass(frozen=True)
class Part:
    """The encoder or the decoder: its program and its stack."""

    body: Body
    loop: Loop


def part_in(inner: Body, path: str) -> Part:
    """The part at ``path``, which ``inner`` calls."""
    found = next((item.body for item in inner.items if isinstance(item, Call) and item.body.path == path), None)
    loops = found.loops() if found is not None else []
    if found is None or len(loops) != 1 or len(found.outputs) != 1:
        raise TargetError(f"{path} is not one stack of layers, from which one value comes")
    return Part(found, loops[0])


def named_parts(layout: Layout, parts: Mapping[str, str], body: str) -> dict[str, str]:
    """``parts`` where the generated model has them; sets those of ``layout`` too."""
    layout.parts = {f"model{path.removeprefix(body) if body else f'.{path}'}": word for path, word in parts.items()}
    return {word: path for path, word in layout.parts.items()}


class PairAssembly(CachedAssembly):
    """``inner`` holds the ``encoder`` and the ``decoder``."""

    def __init__(
        self, graph: Graph, model: Model, name: str, program: Body, inner: Body, encoder: Part, decoder: Part
    ) -> None:
        super().__init__(graph, model, name, program)
        self.inner, self.encoder, self.decoder = inner, encoder, decoder
        self.main_input = next(iter(graph.inputs))
        kind = "AutoModelForSeq2SeqLM" if self.main_input == "input_ids" else "AutoModelForSpeechSeq2Seq"
        self.auto_classes: Mapping[str, str] = {"AutoModel": "Model", kind: "ForConditionalGeneration"}

    def written_at_top(self) -> list[Body]:
        return [self.inner, self.encoder.body, self.decoder.body]

    def own_config(self) -> dict[str, Any]:
        source = self.graph.origin.config or {}
        kept = {name: source[name] for name in KEPT if source.get(name) is not None}
        bits = {"cache_bits": self.model.cache_bits} if self.model.cache_bits else {}
        return {"is_encoder_decoder": True, "use_cache": True, **kept, **bits}

    def top(self) -> str:
        encoder, encoder_lines, encoder_result = self._written(self.encoder, self._encoder_names())
        decoder, decoder_lines, decoder_result = self._written(self.decoder, self._decoder_names())
        hidden = {self.decoder.body.outputs[0]: "hidden_states"}
        head = TopWriter(self.model, without_call(self.program, "model"), hidden)
        head_lines, results = head.all_statements({"logits": self.graph.outputs["logits"]})
        tokens = self.main_input == "input_ids"
        return render(
            "seq2seq.py.jinja",
            prefix=self.model.prefix,
            binaries="kernel_binary" in self.model.helpers,
            stacked=self.stacked,
            main_input=self.main_input,
            tokens=tokens,
            no_split=strings(self._layer_classes()),
            rotary="RotaryEmbedding" in self.model.helpers,
            rotation="LatentRotation" in self.model.helpers,
            bare=self.bare_classes(),
            encoder_init=encoder.init_statements(),
            encoder_forward=[*self._padding(encoder_lines), *encoder_lines],
            encoder_result=encoder_result,
            decoder_init=decoder.init_statements(),
            decoder_forward=[*self._before(decoder_lines), *decoder_lines],
            decoder_result=decoder_result,
            head_init=head.init_statements(),
            head_forward=head_lines,
            head_result=results["logits"],
            head=self._head(),
            tied=mapping(self.tied_tensors),
            tied_inside=mapping(self.tied_inside()),
        )

    def _written(self, part: Part, names: dict[Value, str]) -> tuple[TopWriter, list[str], str]:
        writer = TopWriter(self.model, part.body, names)
        lines, result = writer.statements()
        return writer, lines, result

    def _encoder_names(self) -> dict[Value, str]:
        named = {value: "mask" for value, name in self.model.extras.named.items() if name == "attention_mask"}
        return {self.graph.inputs[self.main_input]: self.main_input, **named}

    def _decoder_names(self) -> dict[Value, str]:
        extras, inputs = self.model.extras, self.graph.inputs
        across = {value: "encoder_mask" for value, name in extras.named.items() if name == "encoder_attention_mask"}
        names = {inputs[DECODER]: "input_ids", extras.cache: "past_key_values", **across}
        names |= {inputs[name]: name for name in (QUERIES, KEYS) if name in inputs}
        names |= {inputs[POSITIONS]: POSITIONS, self.encoder.body.outputs[0]: "encoder_hidden_states"}
        return names | dict.fromkeys(extras.masks.values(), "mask")

    def _padding(self, lines: Sequence[str]) -> list[str]:
        if "mask" not in names_in("\n".join(lines)):
            return []
        self.model.helpers.add("padding_mask")
        return ["mask = padding_mask(input_ids, attention_mask)"]

    def _before(self, lines: Sequence[str]) -> list[str]:
        """Statements that make positions and masks."""
        used = names_in("\n".join(lines))
        found = ["mask = causal_mask(input_ids, attention_mask, past_key_values)"]
        if POSITIONS in used:
            self.model.helpers.add("token_positions")
            found += [
                "if position_ids is None:",
                "    position_ids = token_positions(input_ids, attention_mask, past_key_values)",
            ]
        if KEYS in used:
            found += [
                "past = past_length(past_key_values, input_ids.device)",
                "keys = length = input_ids.shape[1]",
                "if past_key_values is not None:",
                f"    keys, _ = past_key_values.get_mask_sizes(length, {first_cached(self.graph)})",
                f"{KEYS} = torch.arange(keys, device=input_ids.device)",
                f"{QUERIES} = torch.arange(length, device=input_ids.device) + past",
            ]
        if "encoder_mask" in used:
            found += [
                "encoder_mask = None",
                "if encoder_attention_mask is not None:",
                "    encoder_mask = encoder_attention_mask[:, None, None, :].bool()",
            ]
        return found

    def _layer_classes(self) -> list[str]:
        layers = [*self.encoder.loop.layers, *self.decoder.loop.layers]
        return sorted({f"{self.model.prefix}{self.model.classes[layer.path].name}" for layer in layers})
