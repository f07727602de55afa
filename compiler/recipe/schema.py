"""What a recipe may say: its sections as typed dataclasses, and values checked against them.

The options of a pass are the fields of its dataclass, so a pass is typed, checked and completed by editors
without being written down anywhere else. Option names have dashes where fields have underscores.
"""

from __future__ import annotations

import dataclasses
import json
import keyword
import re
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, WithJsonSchema

from compiler.errors import CompressError, RecipeError, nearest
from compiler.recipe.yamltree import Tree, plain_scalar

T = TypeVar("T")

PERCENT = r"\d+(\.\d+)?%"
MEMORY = r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_memory(value: Any) -> int:
    """Bytes of ``4GB`` (10^9) or ``4GiB`` (2^30). Raises ValueError for anything else."""
    match = re.fullmatch(MEMORY, value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a size such as 4GB or 512MiB")
    return round(float(match[1]) * UNITS[match[2] or ""])


def format_memory(count: int) -> str:
    """The shortest exact spelling: ``format_memory(5_000_000_000) == "5GB"``."""
    unit = max((unit for unit, size in UNITS.items() if count % size == 0), key=lambda unit: UNITS[unit])
    return f"{count // UNITS[unit]}{unit}B"


Memory = Annotated[int, BeforeValidator(parse_memory), WithJsonSchema({"type": "string", "pattern": f"^{MEMORY}$"})]
SMALLEST_SHARD = 10**6
Count = Annotated[int, Field(ge=1)]
MetricName = Literal[
    "perplexity", "bits-per-byte", "calibration-error", "kl", "agreement", "perplexity-by-position", "kl-by-position",
    "agreement-by-position", "generation", "needle", "conversation", "choices", "cosine", "relative-error",
    "similarity", "ratings", "neighbours", "probe", "word-errors",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The text, speech or pictures that passes measure activations on: of a text ``samples`` windows of
    ``length`` tokens.

    ``written`` samples more, of at most 256 tokens, are drawn from the language model itself: what it knows and the
    text does not show is then measured too.
    """

    data: Path
    samples: Count = 64
    length: Annotated[int, Field(ge=2)] = 512
    seed: Annotated[int, Field(ge=0)] = 0
    written: Annotated[int, Field(ge=0)] = 0


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """What the result is compared with the original on, and what is measured: without ``metrics`` those that fit.

    ``items`` are questions and the like.
    """

    data: Path
    items: Path | None = None
    samples: Count = 16
    length: Annotated[int, Field(ge=2)] = 512
    seed: Annotated[int, Field(ge=0)] = 0
    metrics: tuple[MetricName, ...] = ()


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the model is for: pictures ``image`` pixels high and wide, by default as its config says."""

    image: Count | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """Where to compute, and how much memory to use.

    Weights are made by threads of this process, by worker ``processes`` of this machine, or by tasks of Ray.
    """

    device: Literal["auto", "cpu"] = "auto"
    memory: Memory | None = None
    executor: Literal["local", "processes", "ray"] = "local"
    workers: Count | None = None


@dataclasses.dataclass(frozen=True)
class Safetensors:
    """A checkpoint directory in sharded safetensors; no file is larger than ``shard`` unless one tensor is.

    ``class`` is the model class: a ``stock`` one of transformers, one ``generated`` from the graph, whose code comes
    with the checkpoint, or ``auto``, which generates one where there is no stock class. ``cache-bits`` generates one
    whose keys and values, or latents, are cached in so many bits. ``sparse: compact`` generates one that reads sparse
    weights from bits and values; by default their zeros are written like other numbers, which any class loads and
    which saves nothing. ``binaries`` generates one that comes with kernels compiled for these GPUs.
    ``quantised-as`` is the layout of quantised weights: that of compressed-tensors, or of GPTQ checkpoints, whose first
    version cannot hold every zero point.
    """

    shard: Memory = 5 * 10**9
    class_: Literal["auto", "stock", "generated"] = "auto"
    cache_bits: Literal[8, 4] | None = None
    sparse: Literal["zeros", "compact"] = "zeros"
    quantised_as: Literal["compressed-tensors", "gptq", "gptq-v2"] = "compressed-tensors"
    binaries: tuple[Literal["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"], ...] = ()

    @property
    def compact(self) -> bool:
        return self.sparse == "compact"

    def __post_init__(self) -> None:
        if self.shard < SMALLEST_SHARD:
            raise RecipeError("`shard` is less than 1MB", option="shard", remedy="the default is `shard: 5GB`")
        if self.class_ == "stock" and self.binaries:
            raise RecipeError(
                "no stock class calls kernels", option="binaries", remedy="leave out `binaries`, or `class: stock`"
            )
        own_code = self.class_ == "generated" or self.cache_bits is not None or self.compact or self.binaries
        if own_code and self.quantised_as != "compressed-tensors":
            raise RecipeError(
                f"no generated class loads weights quantised as {self.quantised_as}",
                option="quantised-as",
                remedy="leave out `quantised-as`, or `class`, `cache-bits`, `sparse` and `binaries`",
            )


@dataclasses.dataclass(frozen=True)
class Onnx:
    """ONNX models in the folder ``onnx``, with their tensors, a cache for decoding, and a script that checks them.

    ``target`` ``ort-cpu`` uses what is fast in ONNX Runtime on a CPU, ``genai`` is that for onnxruntime-genai with its
    config, ``ort-cuda`` in half precision for a GPU, ``onnx`` only standard operations.
    ``accuracy-level`` 4 rounds the inputs of quantised weights to int8, 0 does not and is much slower.
    ``input-error`` measures on calibration data how far that moves what each product gives, over its size; those that
    it moves further take their inputs as they are.
    ``prompts: int8`` adds a model that reads prompts in products of int8, faster than the one for single tokens.
    """

    target: Literal["ort-cpu", "genai", "ort-cuda", "onnx"] = "ort-cpu"
    accuracy_level: Literal[4, 0] = 4
    input_error: Annotated[float, Field(gt=0)] | None = None
    prompts: Literal["same", "int8"] = "same"


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A GGUF file for llama.cpp in the folder ``gguf``. Weights have the block formats that ``quantize`` gave them."""


EMITTERS: Mapping[str, type] = {"safetensors": Safetensors, "onnx": Onnx, "gguf": Gguf}
SECTIONS: Mapping[str, type] = {"inputs": Inputs, "calibration": Calibration, "evaluate": Evaluate, "run": Run}
KEYS = ("model", "inputs", "calibration", "passes", "emit", "evaluate", "run", "include")


def option_names(cls: type) -> list[str]:
    """The options of a section or pass, as recipes spell them."""
    return [option_name(field.name) for field in dataclasses.fields(cls)]


def option_name(field: str) -> str:
    """A field as recipes spell it; one that ends in an underscore would be a keyword of Python without it."""
    return field.rstrip("_").replace("_", "-")


def _field(option: str) -> str:
    name = option.replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def spell(section: Any) -> dict[str, Any]:
    """The options of a section or pass as a recipe spells them."""
    hints = typing.get_type_hints(type(section), include_extras=True)
    spelt: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value, hint = getattr(section, field.name), hints[field.name]
        sized = isinstance(value, int) and Memory in (hint, *get_args(hint))
        spelt[option_name(field.name)] = format_memory(value) if sized else value
    return spelt


def build(cls: type[T], tree: Tree, name: str) -> T:
    """An instance of the dataclass ``cls`` from the mapping ``tree``, which stands under the key ``name``.

    Raises RecipeError (or what the class itself raises) pointing at the wrong key or value.
    """
    if tree.value is not None and not isinstance(tree.value, dict):
        remedy = f"write `{name}: {{option: value}}`; its options are: {', '.join(option_names(cls))}"
        raise RecipeError(f"the options of `{name}` must be a mapping, not {tree.kind}", span=tree.span, remedy=remedy)
    for option, value in tree.items.items():
        if option not in option_names(cls):
            remedy = nearest(option.replace("_", "-"), option_names(cls)) or "it has no options"
            raise RecipeError(f"`{name}` has no option `{option}`", span=value.key, remedy=remedy)
    given = {_field(option): value for option, value in _fractions(cls, tree).items()}
    try:
        return TypeAdapter(cls).validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        raise _explain(cls, tree, name, error) from error
    except CompressError as error:
        option = tree.items.get(error.option.replace("_", "-"))
        error.span = error.span or (option.span if option else tree.place)
        raise


def _fractions(cls: type, tree: Tree) -> dict[str, Any]:
    """The plain options of ``tree``, percentages turned into fractions where a number is expected."""
    hints = typing.get_type_hints(cls)
    given = tree.plain() or {}
    for option, value in given.items():
        numeric = float in _alternatives(hints[_field(option)])
        if numeric and isinstance(value, str) and re.fullmatch(PERCENT, value):
            given[option] = float(value[:-1]) / 100
    return given


def _explain(cls: type, tree: Tree, name: str, failure: ValidationError) -> RecipeError:
    error = failure.errors()[0]
    option = option_name(str(error["loc"][0])) if error["loc"] else name
    path = (option, *error["loc"][1:])
    if error["type"] == "missing":
        remedy = f"add `{option}: …`"
        return RecipeError(f"`{name}` needs the option `{option}`", span=tree.place, remedy=remedy)
    wrong = tree.at(path)
    hint = typing.get_type_hints(cls, include_extras=True)[_field(option)]
    item = _item(hint) if wrong is not tree.at((option,)) else None
    subject = f"an entry of `{option}`" if item else f"`{option}`"
    cause = f"{subject} must be {_expected(item or hint, dict(error))}, not {wrong.kind}"
    return RecipeError(cause, span=wrong.span, remedy=_remedy(cls, option, hint, wrong.value))


def _remedy(cls: type, option: str, hint: Any, value: Any) -> str:
    """The choice that was meant, or how the option is written."""
    choices = [str(choice) for choice in _choices(hint)]
    if isinstance(value, str) and get_close_matches(value, choices, n=1):
        return nearest(value, choices)
    if isinstance(value, str) and not isinstance(plain_scalar(value), str):
        return "remove the quotes"
    (field,) = (field for field in dataclasses.fields(cls) if field.name == _field(option))
    if field.default not in (dataclasses.MISSING, None, ()):
        return f"the default is `{option}: {spell_value(field.default)}`"
    return f"write it like `{option}: {_example(hint)}`"


def _example(hint: Any) -> str:
    if Memory in (hint, *get_args(hint)):
        return "4GB"
    return next((f"[{_EXAMPLES[str]}]" for part in _alternatives(hint) if get_args(part)), "") or next(
        _EXAMPLES[part] for part in _alternatives(hint) if part in _EXAMPLES
    )


_EXAMPLES: Mapping[Any, str] = {int: "16", float: "0.5", bool: "true", str: "lm_head", Path: "path/to/text.txt"}


def spell_value(value: Any) -> str:
    """A value as a recipe spells it, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(spell_value, typing.cast(Sequence[Any], value)))}]"
    if isinstance(value, Mapping):
        entries = typing.cast(Mapping[str, Any], value).items()
        return f"{{{', '.join(f'{name}: {spell_value(inner)}' for name, inner in entries)}}}"
    return "null" if value is None else str(value)


def _item(hint: Any) -> Any:
    """The type of a list's entries; None for other types."""
    lists = (part for part in _alternatives(hint) if get_origin(part) in (tuple, list, Sequence))
    return next((get_args(part)[0] for part in lists), None)


def _choices(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for part in get_args(hint) for choice in _choices(part)]


_BOUNDS = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "greater than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}",
}


def _expected(hint: Any, error: Mapping[str, Any]) -> str:
    context = error.get("ctx", {})
    if error["type"] in _BOUNDS:
        return _BOUNDS[error["type"]].format(**context)
    if error["type"] == "value_error":
        return str(context["error"])
    return describe(hint)


def describe(hint: Any) -> str:
    """A type as a user would say it: ``int | None`` is ``a whole number``. Words to choose from are one list."""
    parts = [part for part in _alternatives(hint) if part is not type(None)]
    choices = [f"`{choice}`" for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    chosen = f"one of {', '.join(choices)}" if len(choices) > 1 else "".join(choices)
    names = [chosen if get_origin(part) is Literal else _describe_one(part) for part in parts]
    return " or ".join(dict.fromkeys(names))


_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number or a percentage",
    bool: "true or false",
    str: "text",
    Path: "a path",
}


_PLURALS: Mapping[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}


def _describe_one(part: Any) -> str:
    origin = get_origin(part) or part
    if part in _WORDS:
        return _WORDS[part]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    inner = [arg for arg in get_args(part) if arg is not Ellipsis]
    return f"a list of {_PLURALS.get(inner[0]) or describe(inner[0])}" if inner else "a list"


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, annotations stripped."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [part for member in get_args(hint) for part in _alternatives(member)]
    return [hint]
