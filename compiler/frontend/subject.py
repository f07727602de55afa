"""What is traced: a module in float32 without data, example inputs, and where its weights come from.

No weight is read or made here. Buffers that no checkpoint holds (rotary frequencies, position ids) are computed on
the CPU by the model's own initialiser, because their values are part of the architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from compiler.errors import CaptureError, CompressError, first_line
from compiler.frontend.examples import default_inputs, dims_of, shaped_like
from compiler.frontend.grids import Grid, grid_of
from compiler.frontend.interfaces import register
from compiler.ir.graph import Origin
from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, load
from compiler.weights.ops.basic import literal
from compiler.weights.plausible import bounded_modules, check_counts
from compiler.weights.source import MemorySource, Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MODEL = "model"
_MAX_LITERAL = 1 << 22


@dataclass
class Subject:
    """A module to trace and everything the graph must know beyond its operations.

    ``weights`` holds an expression for every parameter and buffer by module path; tied weights share an entry's
    tensor, which ``names`` resolves: any module path to the first path of the same tensor. ``stock`` says that class
    and config tell all there is about ``module``. Of a ``grid`` one picture is traced.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    dims: dict[str, dict[int, str]]
    weights: dict[str, Expr]
    names: dict[str, str]
    transient: frozenset[str]
    origin: Origin
    sources: dict[str, Source] = field(default_factory=dict[str, "Source"])
    stock: bool = False
    grid: Grid | None = None


def subject_of(
    model: str | Path | nn.Module | PretrainedConfig,
    inputs: Mapping[str, Tensor] | None,
    architecture: str | None,
    image: int | None = None,
) -> Subject:
    """Prepare ``model`` for tracing. Raises CaptureError, or CheckpointError for a damaged checkpoint."""
    if inputs is not None and image is not None:
        raise CaptureError("example inputs say already how large pictures are", remedy="leave out `image`")
    if isinstance(model, nn.Module):
        return _from_module(model, inputs, image)
    if isinstance(model, str | Path):
        return _from_checkpoint(model, inputs, architecture, image)
    return _from_config(model, inputs, architecture, image)


# --- sources of weights --------------------------------------------------------------------------------------


def _from_config(
    config: PretrainedConfig, inputs: Mapping[str, Tensor] | None, architecture: str | None, image: int | None
) -> Subject:
    module = build_on_meta(config, architecture)
    storage = _storage(config, module)
    weights = {
        name: load(MODEL, name, TensorType(storage(name, tensor), tuple(tensor.shape)))
        for name, tensor in _tensors(module)
    }
    subject = _subject(module, inputs, weights | computed_buffers(module), _origin(module, config), image)
    subject.stock = True
    return subject


def _from_checkpoint(
    path: str | Path, inputs: Mapping[str, Tensor] | None, architecture: str | None, image: int | None
) -> Subject:
    from compiler.weights.checkpoint import open_checkpoint
    from compiler.weights.checkpoint_binding import bind

    checkpoint = open_checkpoint(path)
    config = config_from_dict(checkpoint.config)
    module = build_on_meta(config, architecture or checkpoint.architecture)
    weights = dict(bind(checkpoint, module)) | computed_buffers(module)
    subject = _subject(module, inputs, weights, _origin(module, config, str(checkpoint.path)), image)
    subject.sources[MODEL], subject.stock = checkpoint, True
    return subject


def _from_module(live: nn.Module, inputs: Mapping[str, Tensor] | None, image: int | None) -> Subject:
    from transformers import PreTrainedModel

    if live.training:
        raise CaptureError("the module is in training mode", remedy="call .eval() on it first")
    tensors = dict(_tensors(live))
    module = _copy_on_meta(live)
    if isinstance(module, PreTrainedModel):
        _select_implementations(module)
    transient = _transient(live)
    weights = {
        name: _literal(name, tensor)
        if name in transient
        else load(MODEL, name, TensorType(tensor.dtype, tuple(tensor.shape)))
        for name, tensor in tensors.items()
    }
    subject = _subject(module, inputs, weights, _origin(live, getattr(live, "config", None)), image)
    subject.sources[MODEL] = MemorySource({name: t for name, t in tensors.items() if name not in transient})
    return subject


def _subject(
    module: nn.Module,
    inputs: Mapping[str, Tensor] | None,
    weights: dict[str, Expr],
    origin: Origin,
    image: int | None,
) -> Subject:
    _settle_frequencies(module)
    grid = None if inputs is None else grid_of(module, inputs)
    if inputs is None:
        examples = default_inputs(module, image)
    elif grid is None:
        examples = shaped_like(inputs)
    else:
        examples = {name: tensor[: grid.patches] for name, tensor in inputs.items() if name not in grid.known}
    names = _first_names(module)
    return Subject(
        module=module,
        inputs=_without_data(module, examples),
        dims=dims_of(examples) if grid is None else {name: {} for name in examples},
        grid=grid,
        weights=weights,
        names=names,
        transient=_transient(module),
        origin=origin,
    )


def _without_data(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make every tensor of ``module`` fake, on the CPU rather than meta: constants of its program keep their values."""
    memo: dict[int, Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for child in module.modules():
            for name, tensor in (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)):
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                fake = nn.Parameter(fake, False) if isinstance(tensor, nn.Parameter) else fake
                setattr(child, name, memo.setdefault(id(tensor), fake))
        return {name: torch.empty(x.shape, dtype=x.dtype, device="cpu") for name, x in inputs.items()}


def _settle_frequencies(module: nn.Module) -> None:
    """A "longrope" table that is the same for short and long texts is plain: nothing is chosen at run time."""
    for child in module.modules():
        if getattr(child, "rope_type", None) == "longrope":
            parameters = cast(Any, child).config.rope_parameters
            if parameters["short_factor"] == parameters["long_factor"]:
                cast(Any, child).rope_type = "default"


def _origin(module: nn.Module, config: Any, source: str | None = None) -> Origin:
    """Where ``module`` is from; ``config`` as its owner has it, before anything was set for tracing."""
    if not hasattr(config, "to_dict"):
        return Origin(source=source)
    with _accepted():
        values = config.to_dict()
    return Origin(architecture=type(module).__name__, config=values, source=source)


# --- building a module on the meta device --------------------------------------------------------------------


def config_from_dict(values: Mapping[str, Any]) -> PretrainedConfig:
    """The typed config of a ``config.json``. Raises CaptureError when transformers does not know the model type."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers import __version__ as version

    kind = values.get("model_type")
    known = {name: value for name, value in values.items() if name not in ("model_type", "transformers_version")}
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = get_close_matches(str(kind), CONFIG_MAPPING.keys(), n=1)
        remedy = f"did you mean `{near[0]}`?" if near else f"transformers {version} may be too old for it"
        raise CaptureError(f"transformers does not know the model type `{kind}`", remedy=remedy)
    check_counts(known, "config.json")
    with _accepted():
        return AutoConfig.for_model(kind, **known)


@contextmanager
def _accepted() -> Generator[None]:
    """Turn whatever a class raises over the values of its config into CaptureError."""
    try:
        yield
    except CompressError:
        raise
    except Exception as reason:  # each class checks its values, or stumbles over them, in its own way
        raise CaptureError(
            f"transformers cannot make a model of this config: {first_line(reason)}",
            where="config.json",
            remedy="correct the value that it names",
        ) from reason


def build_on_meta(config: PretrainedConfig, architecture: str | None = None) -> PreTrainedModel:
    """The model of ``config`` in float32 on the meta device, with our attention and experts implementations."""
    config = copy.deepcopy(config)
    config.use_cache = config.output_hidden_states = config.output_attentions = False
    cls = _model_class(config, architecture)
    storage = config.dtype
    with _accepted(), bounded_modules("config.json"), torch.device("meta"):
        model: Any = _with_our_attention(cls, config).eval()
    _select_implementations(model)
    model.config.dtype = storage
    return model


def _with_our_attention(cls: Any, config: PretrainedConfig) -> Any:
    try:
        return cls._from_config(config, dtype=torch.float32, attn_implementation=register())
    except KeyError as reason:
        if reason.args != (register(),):
            raise
        raise CaptureError(
            f"the attention of `{cls.__name__}` cannot be replaced for tracing",
            remedy="capture takes models whose attention goes through transformers' attention interface",
        ) from reason


def _model_class(config: PretrainedConfig, architecture: str | None) -> type[PreTrainedModel]:
    import transformers

    name = architecture or _first_architecture(config)
    if name is None:
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) not in mapping:
            raise CaptureError(
                f"the config of a `{config.model_type}` does not name a model class",
                remedy="pass architecture=, for example the class name that config.json's `architectures` holds",
            )
        return cast("type[PreTrainedModel]", mapping[type(config)])
    cls = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        remedy = "correct `architectures` in config.json, or let a newer transformers read it"
        raise CaptureError(f"transformers has no model class `{name}`", remedy=remedy)
    return cls


def _first_architecture(config: PretrainedConfig) -> str | None:
    names: Any = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast(list[Any], names)):
        raise CaptureError(
            f"`architectures` is {names!r}", where="config.json", remedy="it must be a list of names of model classes"
        )
    return next(iter(cast(list[str], names)), None)


def _select_implementations(model: Any) -> None:
    """Prepare a model of our own for tracing: no cache, and attention and experts as opaque operations."""
    name = register()
    model.set_attn_implementation(name)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(name)
    for child in model.modules():
        if hasattr(child, "config"):
            child.config.use_cache = False


def _copy_on_meta(live: nn.Module) -> nn.Module:
    """A copy of ``live`` whose tensors are on the meta device and whose floating ones are float32."""
    memo: dict[int, Any] = {}
    for _, tensor in _tensors(live):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(live, memo)


# --- parameters and buffers ----------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _first_names(module: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in _tensors(module)}


def _transient_buffers(module: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """(path, owner, name) of every buffer that a state dict leaves out."""
    for path, child in module.named_modules():
        owner: Any = child
        for name in owner._non_persistent_buffers_set:
            if owner._buffers.get(name) is not None:
                yield (f"{path}.{name}" if path else name), owner, name


def _transient(module: nn.Module) -> frozenset[str]:
    return frozenset(path for path, _, _ in _transient_buffers(module))


def computed_buffers(model: Any) -> dict[str, Expr]:
    """The values of buffers that no checkpoint holds, computed on the CPU by the initialiser of their model.

    Raises CaptureError for one that it does not compute, or that is too large.
    """
    found: dict[str, Expr] = {}
    for path, child, name in list(_transient_buffers(model)):
        meta: Tensor = child._buffers[name]
        _check_size(path, meta)
        child._buffers[name] = torch.full(meta.shape, _unset(meta.dtype), dtype=meta.dtype)
        with torch.no_grad():
            _innermost(model, path)._init_weights(child)
        value: Tensor = child._buffers[name]
        child._buffers[name] = meta
        if bool((value.isnan() if value.is_floating_point() else value == _unset(value.dtype)).any()):
            raise CaptureError(
                "the buffer is in no checkpoint, and the model does not compute it",
                where=path,
                remedy="correct the settings of the config that it is made from",
            )
        found[path] = _literal(path, value)
    return found


def _innermost(model: Any, path: str) -> Any:
    """The smallest model around ``path``: the class of a tower knows its buffers, that of the whole may not."""
    from transformers import PreTrainedModel

    found = module = model
    for name in path.split(".")[:-1]:
        module = getattr(module, name)
        found = module if isinstance(module, PreTrainedModel) else found
    return found


def _unset(dtype: torch.dtype) -> float:
    """What marks an element that nothing was written to."""
    return torch.nan if dtype.is_floating_point else -1


def _check_size(path: str, value: Tensor) -> None:
    if value.numel() > _MAX_LITERAL:
        raise CaptureError(
            f"a buffer of {value.numel()} elements is in no checkpoint",
            where=path,
            remedy=f"at most {_MAX_LITERAL} can be; a size in config.json, such as its positions, may be wrong",
        )


def _literal(path: str, value: Tensor) -> Expr:
    _check_size(path, value)
    return literal(value.flatten().tolist(), value.shape, value.dtype)


def _storage(config: PretrainedConfig, model: Any) -> Callable[[str, Tensor], torch.dtype]:
    """The dtype a tensor has in a checkpoint of ``config``: the config's, but for what its class keeps in float32."""
    named = config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, str(config.dtype), None)
    default = named if isinstance(named, torch.dtype) else torch.float32
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if any(f".{part}." in f".{name}." for part in kept) else default

    return dtype_of
