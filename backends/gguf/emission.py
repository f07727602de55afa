"""What is written for a graph: the architecture of llama.cpp that holds it, its metadata, and its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from backends.gguf.architectures import ARCHITECTURES, Architecture, Config, metadata_of, refusal
from backends.gguf.header import Metadata
from backends.gguf.pooling import pooling
from backends.gguf.tensors import Format, named, stored
from backends.gguf.tokenizer import Tokenizer, tokenizer_of
from compiler.errors import TargetError
from compiler.weights.expr import Expr
from compiler.weights.ops.codec import is_quantised
from compiler.weights.rows import as_dequantize
from compiler.weights.source import Source

REMEDY = "leave `gguf` out of `emit`, or the pass that made it so"
WINDOWED = ("gemma2", "gemma3")  # whose windows llama.cpp reads
LEFT_OUT = ("mistral", "qwen2", "phi3")  # whose windows its own converter leaves out


@dataclass(frozen=True)
class GgufEmission:
    """A file in the making. ``architecture`` is the transformers class whose config and names it is made from.

    ``tokens`` are those that remain of a vocabulary, whose ``tokenizer`` is made when the file is written; None: all.
    """

    architecture: str
    config: Config
    kind: str
    sizes: Metadata
    named: Mapping[str, Expr]
    notes: tuple[str, ...] = ()
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
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
    architecture: str,
    config: Config,
    tensors: Mapping[str, Expr],
    *,
    windows: Collection[int] = (),
    model: Source | None = None,
    tokens: Sequence[int] | None = None,
) -> GgufEmission:
    """The file for ``tensors`` of a transformers ``architecture``, by the names that its checkpoints have.

    ``windows`` are the lengths, in tokens, that attention of the graph is bounded to (0: not bounded), ``model`` is the
    checkpoint that has the tokenizer, of which ``tokens`` remain (None: all). Reads no weight. Raises TargetError
    when llama.cpp has no architecture that computes what ``config`` and ``windows`` say, blocks are of no format of its
    files, or it has no code for the tokenizer.
    """
    kind = ARCHITECTURES.get(str(config["model_type"]))
    if kind is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise TargetError(f"GGUF files of `{config['model_type']}` are not written; of {known} they are", remedy=REMEDY)
    reason = refusal(kind, config) or _unread_window(kind.name, config, windows) or _other_codes(tensors)
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
    tokenizer = tokenizer_of(model, int(config["vocab_size"])) if tokens is None else Tokenizer()
    pooled, unpooled = pooling(kind.name, model)
    notes = (*_notes(kind.name, windows), *_unread(kind, tensors), *tokenizer.notes, *unpooled)
    sizes = {**metadata_of(kind, config), **pooled}
    return GgufEmission(architecture, config, kind.name, sizes, found, notes, tokenizer, tokens)


def _other_codes(tensors: Mapping[str, Expr]) -> str:
    """Why quantised tensors cannot be written; "" where all are blocks."""
    for key, expr in tensors.items():
        value = as_dequantize(expr)
        if value is not None and value.op != "dequantize_gguf":
            return f"{key} is quantised in a way that is no block format (`type: q4_0` and others are)"
    return ""


def _has_blocks(expr: Expr) -> bool:
    return is_quantised(expr) or any(_has_blocks(arg) for arg in expr.args)


def _unread_window(kind: str, config: Config, windows: Collection[int]) -> str:
    """Which window would be lost, where that changes what is computed; "" for none and for those that are a note."""
    lost = [window for window in windows if 0 < window < config.get("max_position_embeddings", 0)]
    if not lost or kind in WINDOWED or config["model_type"] in LEFT_OUT:
        return ""
    return f"its architecture {kind} has no window, and attention of the model has one of {min(lost)} tokens"


def _unread(kind: Architecture, tensors: Mapping[str, Expr]) -> tuple[str, ...]:
    left = sorted({name for name in kind.unread if any(key.startswith(name) for key in tensors)})
    return tuple(f"llama.cpp does not compute what {name} makes: it is left out" for name in left)


def _notes(kind: str, windows: Collection[int]) -> tuple[str, ...]:
    lost = [] if kind in WINDOWED else sorted({*windows} - {0})
    return tuple(f"llama.cpp attends to all tokens where the model has a window of {window}" for window in lost)
