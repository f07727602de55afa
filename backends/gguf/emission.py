"""What is written for a graph: the architecture of llama.cpp that holds it, its metadata, and its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from backends.gguf.architectures import ARCHITECTURES, Config, metadata_of, refusal
from backends.gguf.header import Metadata
from backends.gguf.tensors import Format, named, stored
from compiler.errors import TargetError
from compiler.weights.expr import Expr
from compiler.weights.ops.codec import is_quantised
from compiler.weights.rows import as_dequantize

REMEDY = "leave `gguf` out of `emit`, or the pass that made it so"
WINDOWLESS = ("mistral", "qwen2", "phi3")  # whose windows llama.cpp leaves out


@dataclass(frozen=True)
class GgufEmission:
    """A file in the making. ``architecture`` is the transformers class whose config and names it is made from."""

    architecture: str
    config: Config
    kind: str
    sizes: Metadata
    named: Mapping[str, Expr]
    notes: tuple[str, ...] = ()
    tokens: Sequence[int] | None = None

    @property
    def target(self) -> str:
        """What a report calls the target."""
        return f"gguf: {self.kind}"

    @cached_property
    def tensors(self) -> Mapping[str, Expr]:
        """What is written, by name: blocks as bytes, other tensors as they are."""
        return {name: stored(name, expr)[0] for name, expr in self.named.items()}

    @cached_property
    def formats(self) -> Mapping[str, Format]:
        return {name: stored(name, expr)[1] for name, expr in self.named.items()}

    @property
    def nbytes(self) -> int:
        return sum(expr.type.nbytes for expr in self.tensors.values())

    @property
    def loads_in(self) -> tuple[str, ...]:
        """Where it loads, and what the user should know."""
        return (f"llama.cpp (architecture {self.kind})", *(f"but: {note}" for note in self.notes))


def propose(
    architecture: str, config: Config, tensors: Mapping[str, Expr], *, tokens: Sequence[int] | None = None
) -> GgufEmission:
    """The file for ``tensors`` of a transformers ``architecture``, by the names that its checkpoints have.

    Reads no weight. Raises TargetError when llama.cpp has no architecture that computes what ``config`` says, or blocks
    are of no format of its files.
    """
    kind = ARCHITECTURES.get(str(config["model_type"]))
    if kind is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise TargetError(f"GGUF files of `{config['model_type']}` are not written; of {known} they are", remedy=REMEDY)
    reason = refusal(kind, config) or _other_codes(tensors)
    if reason:
        raise TargetError(f"llama.cpp does not hold this: {reason}", remedy=REMEDY)
    found = named(tensors, kind, config)
    if isinstance(found, str):
        raise TargetError(f"llama.cpp's architecture {kind.name} has no tensor for {found}", remedy=REMEDY)
    broken = next((name for name, expr in found.items() if _has_blocks(expr) and as_dequantize(expr) is None), "")
    if broken:
        raise TargetError(
            f"blocks of {broken} do not stay whole in the layout of a GGUF file", remedy="quantise others"
        )
    sizes = metadata_of(kind, config)
    return GgufEmission(architecture, config, kind.name, sizes, found, _notes(config), tokens)


def _other_codes(tensors: Mapping[str, Expr]) -> str:
    """Why quantised tensors cannot be written; "" where all are blocks."""
    for key, expr in tensors.items():
        value = as_dequantize(expr)
        if value is not None and value.op != "dequantize_gguf":
            return f"{key} is quantised in a way that is no block format (`type: q4_0` and others are)"
    return ""


def _has_blocks(expr: Expr) -> bool:
    return is_quantised(expr) or any(_has_blocks(arg) for arg in expr.args)


def _notes(config: Config) -> tuple[str, ...]:
    window = config.get("sliding_window") if config["model_type"] in WINDOWLESS else None
    if window and set(config.get("layer_types") or ()) != {"full_attention"}:
        return (f"llama.cpp attends to all tokens where the model has a window of {window}",)
    return ()
