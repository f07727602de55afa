"""What is written for a graph: one or more ONNX models over one set of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from backends.onnx.check import PROMPT
from backends.onnx.genai import require_generation
from backends.onnx.levels import Levels
from backends.onnx.lower import Lowered, is_causal, lowered
from backends.onnx.pair import is_pair, lowered_decoder, lowered_encoder
from backends.onnx.target import CONTRIB, TARGETS, Target
from compiler.errors import TargetError, nearest
from compiler.ir.facts import what_is_apart
from compiler.ir.graph import Graph, Param
from compiler.weights.expr import Expr

PROMPTS = ("same", "int8")
ENCODER, MAIN = "encoder.onnx", ("model.onnx", "decoder.onnx")


@dataclass(frozen=True)
class OnnxEmission:
    """Models by file name. ``kind`` says how they are run: ``causal``, ``encoder``, or a ``pair`` of both. ``accuracy``
    4 rounds the inputs of products with quantised weights to int8, 0 does not; ``levels`` say which do not all the
    same, once that was measured."""

    graph: Graph
    runtime: Target
    kind: str
    models: Mapping[str, Lowered]
    accuracy: int
    levels: Levels | None = None

    @property
    def target(self) -> str:
        """What a report calls the target."""
        return f"onnx: {self.runtime.name}"

    @property
    def architecture(self) -> str:
        return self.graph.origin.architecture or self.graph.name

    @property
    def config(self) -> Mapping[str, object]:
        """The config of the model that the graph was captured from."""
        return self.graph.origin.config or {}

    @property
    def rounds_inputs(self) -> bool:
        """Whether a product takes its inputs rounded to int8."""
        used = {name for model in self.models.values() for name in model.operations(CONTRIB)}
        return PROMPT in self.models or (self.accuracy != 0 and not used.isdisjoint({"MatMulNBits", "QMoE"}))

    @property
    def loads_in(self) -> tuple[str, ...]:
        """Where it runs, and what the user should know."""
        opset = max(model.opset for model in self.models.values())
        opsets = f"opset {opset}" + (" and its own operations" if self.runtime.contrib else "")
        loop = "onnxruntime-genai, and " if self.runtime.genai else ""
        runtime = max((model.runtime for model in self.models.values()), key=lambda text: int(text.split(".")[1]))
        where = f"{loop}ONNX Runtime {runtime} or later ({opsets})"
        return (where, *(f"but: {note}" for note in self.notes))

    def exact(self) -> OnnxEmission:
        """The same tensors, with nothing that is computed rounded to codes: neither inputs nor activations."""
        return propose(self.graph, self.runtime.name, accuracy=0, rounds=False)

    def with_levels(self, levels: Levels) -> OnnxEmission:
        """The same tensors, with products that take their inputs as they are where ``levels`` say so."""
        prompts = "int8" if PROMPT in self.models else "same"
        found = propose(
            self.graph, self.runtime.name, accuracy=self.accuracy, prompts=prompts, unrounded=levels.unrounded
        )
        return replace(found, levels=levels)

    @property
    def main(self) -> str:
        """The file of the model that gives the outputs."""
        return next(name for name in MAIN if name in self.models)

    @cached_property
    def tensors(self) -> Mapping[str, Expr]:
        """All tensors in files, by name."""
        return {name: stored.expr for model in self.models.values() for name, stored in model.stored.items()}

    @property
    def nbytes(self) -> int:
        return sum(expr.type.nbytes for expr in self.tensors.values())

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know, with how often it applies."""
        counts: dict[str, int] = {}
        for model in self.models.values():
            for note, count in model.notes.items():
                counts[note] = counts.get(note, 0) + count
        levels = [] if self.levels is None else [self.levels.note()]
        return [*(f"{note} ({count} times)" for note, count in counts.items()), *levels, *what_is_apart(self.graph)]

    def metadata(self, model: Lowered) -> dict[str, str]:
        """How a model was made, for its ``metadata_props``."""
        used = model.operations(CONTRIB)
        return {
            "compress-model.target": self.runtime.name,
            "compress-model.kind": self.kind,
            "compress-model.graph": self.graph.name,
            "compress-model.opset": str(model.opset),
            "compress-model.contrib-operations": ", ".join(used),
            "compress-model.onnxruntime": f">={model.runtime}",
            "compress-model.cache-in-place": "yes" if model.in_place else "no",
            "compress-model.padding": "right" if self.runtime.right else "either side",
            "compress-model.accuracy-level": str(self.accuracy),
            **({"compress-model.stages": model.stages} if model.stages else {}),
            "compress-model.notes": "; ".join(self.notes),
        }


def target_named(name: str) -> Target:
    """Raises TargetError for an unknown target."""
    if name not in TARGETS:
        raise TargetError(f"there is no ONNX target `{name}`", remedy=nearest(name, TARGETS))
    return TARGETS[name]


def propose(
    graph: Graph,
    target: str = "ort-cpu",
    *,
    accuracy: int = 4,
    rounds: bool = True,
    prompts: str = "same",
    unrounded: frozenset[str] = frozenset(),
) -> OnnxEmission:
    """What is written for ``graph``. Reads no weight.

    ``accuracy`` 4 multiplies quantised weights with inputs rounded to int8, 0 with inputs as they are. ``unrounded``
    weights take them as they are in any case; encoder-decoders have none. Without ``rounds``, activations that the
    graph rounds are not. With ``prompts`` of int8 a second model reads prompts, in products of int8. Raises
    TargetError naming the operation and scope of what has no ONNX form.
    """
    wanted = target_named(target)
    if prompts == "int8":
        _require_prompts(graph, wanted, accuracy)
    if is_pair(graph):
        if wanted.genai:
            require_generation(OnnxEmission(graph, wanted, "pair", {}, accuracy))
        encoder = lowered_encoder(graph, wanted, accuracy=accuracy, rounds=rounds)
        decoder = lowered_decoder(graph, wanted, accuracy=accuracy, rounds=rounds)
        return OnnxEmission(graph, wanted, "pair", {ENCODER: encoder, MAIN[1]: decoder}, accuracy)
    names = (MAIN[0], PROMPT) if prompts == "int8" else (MAIN[0],)
    models = {
        name: lowered(graph, wanted, accuracy=accuracy, rounds=rounds, many=name == PROMPT, unrounded=unrounded)
        for name in names
    }
    found = OnnxEmission(graph, wanted, "causal" if is_causal(graph) else "encoder", models, accuracy)
    if wanted.genai:
        require_generation(found)
    return found


def _require_prompts(graph: Graph, target: Target, accuracy: int) -> None:
    """Raises TargetError when prompts cannot be read by a model of their own."""
    if target.name != "ort-cpu":
        cause = f"`prompts: int8` needs an operation of ONNX Runtime's on a CPU, which `{target.name}` has not"
        raise TargetError(cause, remedy="write `target: ort-cpu`")
    if not accuracy:
        cause = "`prompts: int8` rounds the inputs of products to int8, which `accuracy-level: 0` is to prevent"
        raise TargetError(cause, remedy="leave one of them out")
    if not is_causal(graph):
        raise TargetError("`prompts: int8` is for language models, and this is none", remedy="leave it out")
    weights = [node.input(1) for node in graph.nodes_named("linear")]
    if not any(isinstance(weight, Param) and weight.expr.op == "dequantize" for weight in weights):
        remedy = "quantise weights to integers, or leave it out"
        raise TargetError("`prompts: int8` is for quantised weights, and this model has none", remedy=remedy)
