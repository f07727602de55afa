"""Between a checkpoint's tensors and a model's parameters, through transformers' own conversion mapping.

Many families store tensors under other names or in another layout than their module has (experts one by one,
fused projections). transformers knows how for every family; its converters are run on traced tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from compiler.errors import CheckpointError
from compiler.weights.conversion import TracedTensor
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import Expr, load
from compiler.weights.ops import take
from compiler.weights.ops.basic import transpose
from compiler.weights.source import Source

if TYPE_CHECKING:
    from compiler.weights.checkpoint import Checkpoint

_SHOWN = 5
_ROWS = 1024
_DEAD_BUFFERS = (r"rotary_emb\.inv_freq$", r"position_ids$")


def bind(checkpoint: Checkpoint, model: Any, *, source: str = "model") -> dict[str, Expr]:
    """An expression for every parameter and persistent buffer of ``model``, by its name in the module.

    ``model`` is a transformers model (usually on the meta device); it is not changed. Tied parameters all get the
    expression of the stored one. Raises CheckpointError for missing, unexpected or doubled tensors and for
    shapes that do not fit, except for those that the model class itself declares ignorable.
    """
    _check_scaled(checkpoint)
    expected = dict(model.state_dict())
    bound: dict[str, Expr] = {}
    unexpected: list[str] = []
    for mapping, first_target in _group(checkpoint, model, expected, source, unexpected):
        for name, tensor in _convert(mapping, first_target, model).items():
            _add(bound, name, tensor.expr, expected, unexpected)
    _share_tied(bound, model, {source: checkpoint})
    _check_complete(bound, expected, unexpected, model, checkpoint)
    return {name: bound[name] for name in expected if name in bound}


def unbind(tensors: Mapping[str, Expr], model: Any) -> dict[str, Expr]:
    """The tensors of a checkpoint, by the names and in the layout that loaders of this family expect.

    ``tensors`` are expressions by parameter name of ``model`` (a transformers model, usually on the meta device).
    """
    from transformers.core_model_loading import revert_weight_conversion

    traced: dict[str, Any] = {name: TracedTensor(expr) for name, expr in tensors.items()}
    stored = cast(Mapping[str, Any], revert_weight_conversion(model, traced))
    return {name: tensor.expr for name, tensor in stored.items()}


def _group(
    checkpoint: Checkpoint, model: Any, expected: dict[str, Any], source: str, unexpected: list[str]
) -> Iterable[tuple[Any, str]]:
    """Transforms with the tensors they apply to collected in them, each with the first name it produces."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )
    from transformers.pytorch_utils import Conv1D

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    groups: dict[str, Any] = {}
    for key in sorted(checkpoint.types, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None
        if name not in expected:
            unexpected.append(key)
            continue
        fresh = WeightRenaming(key, name) if pattern is None else deepcopy(by_pattern[pattern])
        group = groups.setdefault(name, fresh)
        if pattern is None and group is not fresh:
            raise CheckpointError(
                f"{name} is stored twice: as {key} and in another form",
                where=str(checkpoint.path),
                remedy="remove one of the two, or fetch the checkpoint again",
            )
        expr = load(source, key, checkpoint.types[key])
        if checkpoint.is_linear(key) and name in turned:
            expr = transpose(expr)
        group.add_tensor(name, key, pattern or key, TracedTensor(expr))
    return [(group, name) for name, group in groups.items()]


def _convert(mapping: Any, first_target: str, model: Any) -> dict[str, Any]:
    try:
        converted = mapping.convert(first_target, model=model, config=model.config)
    except CheckpointError:
        raise
    except Exception as reason:  # a converter fails in its own way when tensors are missing or of another shape
        raise CheckpointError(
            f"the tensors for {first_target} do not fit together: {reason}",
            remedy=f"config.json says {type(model).__name__}: are all files there, and of that model?",
        ) from reason
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _add(bound: dict[str, Expr], name: str, expr: Expr, expected: Mapping[str, Any], unexpected: list[str]) -> None:
    if name not in expected:
        unexpected.append(name)
        return
    if name in bound:
        raise CheckpointError(
            f"the checkpoint holds {name} twice", remedy="remove one of them, or fetch the checkpoint again"
        )
    if expr.shape != tuple(expected[name].shape):
        raise CheckpointError(
            f"tensor {name} has the shape {list(expr.shape)}, the model's is {list(expected[name].shape)}",
            remedy="config.json and the weights do not belong together",
        )
    bound[name] = expr


def _share_tied(bound: dict[str, Expr], model: Any, sources: Mapping[str, Source]) -> None:
    """Give every name of a tied parameter the expression of the name that is stored; of one, if they are equal."""
    for target, origin in model.all_tied_weights_keys.items():
        if origin not in bound and target not in bound:
            continue
        if origin in bound and target in bound and not _equal(bound[origin], bound[target], sources):
            raise CheckpointError(
                f"config.json says that {target} is tied to {origin}, but their stored values differ",
                remedy="set `tie_word_embeddings` to false in config.json",
            )
        bound[origin] = bound[target] = bound[origin] if origin in bound else bound[target]


def _equal(x: Expr, y: Expr, sources: Mapping[str, Source]) -> bool:
    """Whether two tensors are stored with the same type and bytes; they are read some rows at a time."""
    if x.key == y.key:
        return True
    if x.type != y.type:
        return False
    rows = x.type.static_shape[0]
    ranges = [(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS)]
    return all(_same_bytes(*evaluate([take(each, 0, *span) for each in (x, y)], sources)) for span in ranges)


def _same_bytes(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8))


def _check_scaled(checkpoint: Checkpoint) -> None:
    """Weights in eight bits mean nothing without their scales, and only a quantization_config says what these are."""
    for name, type in checkpoint.types.items():
        if type.dtype.is_floating_point and type.dtype.itemsize == 1:
            raise CheckpointError(
                f"tensor {name} is stored as {type.dtype}, and config.json has no quantization_config that says how it "
                "is scaled",
                where=str(checkpoint.path),
                remedy="start from the original, unquantised checkpoint",
            )


def _check_complete(
    bound: Mapping[str, Expr], expected: Mapping[str, Any], unexpected: list[str], model: Any, checkpoint: Checkpoint
) -> None:
    missing = _declared(expected.keys() - bound.keys(), model._keys_to_ignore_on_load_missing or ())
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {_listing(missing)}",
            where=str(checkpoint.path),
            remedy=f"config.json says {type(model).__name__}: are all files of the model there?",
        )
    surplus = _declared(unexpected, (*(model._keys_to_ignore_on_load_unexpected or ()), *_DEAD_BUFFERS))
    surplus = [name for name in surplus if not checkpoint.is_filler(name)]
    if surplus:
        cause = f"{type(model).__name__} has no place for {_listing(surplus)}"
        raise CheckpointError(cause, where=str(checkpoint.path), remedy="does config.json name the right architecture?")


def _declared(names: Iterable[str], ignored: Iterable[str]) -> list[str]:
    """``names`` without those that match a pattern which the model class declares ignorable."""
    patterns = [re.compile(pattern) for pattern in ignored]
    return sorted(name for name in names if not any(pattern.search(name) for pattern in patterns))


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)}: {', '.join(names[:_SHOWN])}{more}"
