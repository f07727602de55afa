"""Quantised weights as compressed-tensors: which tensors stand for them, and the config that finds them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backends.safetensors.formats import Scheme, format_of, pack_quantized, scheme_of
from backends.safetensors.unify import Mismatch
from compiler.ir.graph import Param
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import take
from compiler.weights.ops.basic import cast, concat, index, reshape

ROW_MOVES = ("slice", "reshape", "concat", "index")
EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")


@dataclass(frozen=True)
class Quantised:
    """The ``quantization_config`` of config.json, and what a user should know about it."""

    config: Mapping[str, Any]
    notes: tuple[str, ...]


def stored_parts(key: str, expr: Expr) -> dict[str, Expr]:
    """The tensors of the file that stand for ``expr`` under ``key``: itself when it is dense, otherwise its parts."""
    value = as_dequantize(expr)
    if value is None:
        return {key: expr}
    storage = format_of(scheme_of(value), expert=bool(EXPERT.search(key)))
    return {key.removesuffix("weight") + suffix: part for suffix, part in storage.parts(value).items()}


def stored_tensors(param: Param) -> list[Expr]:
    """The tensors of a file that stand for ``param``, without their names: what they take is known from this alone.

    Checkpoints hold quantised experts one by one, and the two halves of a gated one apart.
    """
    if param.expr.op != "dequantize":
        return [cast(param.expr, param.storage)]
    matrices = [param.expr] if param.type.rank == 2 else _expert_matrices(param)
    key = "weight" if param.type.rank == 2 else "experts.0.weight"
    return [part for matrix in matrices for part in stored_parts(key, matrix).values()]


def _expert_matrices(param: Param) -> list[Expr]:
    gated = any(node.op.name == "experts" and node.inputs[3] is param for node in param.users)
    count, rows, width = param.expr.shape
    halves = 2 if gated else 1
    split = reshape(param.expr, (count * halves, rows // halves, width))
    return [reshape(take(split, 0, i, i + 1), (rows // halves, width)) for i in range(count * halves)]


def as_dequantize(expr: Expr) -> Expr | None:
    """``expr`` as a ``dequantize``, when it rearranges whole rows of some of one scheme; None when it does not."""
    if expr.op == "dequantize":
        return expr
    if expr.op not in ROW_MOVES:
        return None
    values = [as_dequantize(arg) for arg in expr.args]
    whole = [value for value in values if value is not None]
    if len(whole) < len(values) or len({(value.attrs, len(value.args)) for value in whole}) > 1:
        return None
    columns = zip(*(value.args for value in whole), strict=True)
    parts = [_moved(expr, list(column)) for column in columns]
    kept = [part for part in parts if part is not None]
    return apply("dequantize", kept, dict(whole[0].attrs)) if len(kept) == len(parts) else None


def _moved(expr: Expr, parts: list[Expr]) -> Expr | None:
    """What ``expr`` does to the rows of values, done to those of their codes or scales; None when it breaks rows."""
    last = expr.type.rank - 1
    match expr.op:
        case "reshape" if expr.shape[-1] == expr.args[0].shape[-1]:
            return reshape(parts[0], (*expr.shape[:-1], parts[0].shape[-1]))
        case "slice" if expr.attr("axis") < last:
            return take(parts[0], expr.attr("axis"), expr.attr("start"), expr.attr("stop"))
        case "concat" if expr.attr("axis") < last:
            return concat(parts, expr.attr("axis"))
        case "index" if expr.attr("axis") < last:
            return index(parts[0], expr.attr("axis"), expr.attr("indices"))
        case _:
            return None


def quantization_config(tensors: Mapping[str, Expr], module: Any) -> Quantised | Mismatch | None:
    """The config for ``tensors`` (dense expressions by checkpoint name) of ``module``; None when all are dense.

    A Mismatch says which weight cannot be stored quantised.
    """
    schemes: dict[str, Scheme] = {}
    dense: set[str] = set()
    for key, expr in tensors.items():
        value = as_dequantize(expr)
        if value is None and not _is_dense(expr, dense):
            return Mismatch(f"{key} would be quantised in part, or along its rows; give all of it one scheme, or skip it")
        if value is not None and not key.endswith(".weight"):
            return Mismatch(f"{key} is quantised, and only the weights of modules can be stored so; skip it")
        if value is not None:
            schemes[key.removesuffix(".weight")] = scheme_of(value)
    return _config(schemes, module) if schemes else None


def _is_dense(expr: Expr, known: set[str]) -> bool:
    """Whether nothing in ``expr`` is dequantised; ``known`` are the keys of expressions of which that is known."""
    if expr.key not in known and expr.op != "dequantize" and all(_is_dense(arg, known) for arg in expr.args):
        known.add(expr.key)
    return expr.key in known


def _config(schemes: Mapping[str, Scheme], module: Any) -> Quantised | Mismatch:
    from torch import nn

    linears = dict.fromkeys(name for name, child in module.named_modules() if isinstance(child, nn.Linear))
    by_scheme: dict[tuple[Scheme, bool], list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault((scheme, bool(EXPERT.search(name))), []).append(name)
    reason = _unloadable(list(by_scheme))
    if reason:
        return Mismatch(reason)
    common = max(by_scheme, key=lambda key: sum(name in linears for name in by_scheme[key]))
    ordered = sorted(by_scheme, key=lambda key: key == common)  # names before the class: loaders take the first match
    described = [_group(key, by_scheme[key], linears, key == common) for key in ordered]
    groups = {f"group_{index}": group for index, group in enumerate(described)}
    formats = {group["format"] for group in groups.values()}
    config = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in schemes],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if any(_has_packed_zeros(*key) for key in by_scheme):
        config["dequantize"] = True  # transformers reads packed zero points only when it dequantises while loading
    return Quantised(config, tuple(_fused_notes(schemes, linears)))


def _unloadable(schemes: list[tuple[Scheme, bool]]) -> str:
    """Why transformers cannot load a model with weights of these schemes (and whether they are experts); "" if it can.

    Without zero points for experts, and for one scheme at a time when it dequantises while loading.
    """
    if any(expert and not scheme.symmetric for scheme, expert in schemes):
        return "transformers reads no zero points of experts; make them symmetric"
    if len(schemes) > 1 and any(_has_packed_zeros(*key) for key in schemes):
        return "transformers reads packed zero points only of models with one scheme; make the weights symmetric"
    return ""


def _has_packed_zeros(scheme: Scheme, expert: bool) -> bool:
    return not scheme.symmetric and format_of(scheme, expert=expert) is pack_quantized.FORMAT


def _group(key: tuple[Scheme, bool], names: list[str], linears: Mapping[str, None], common: bool) -> dict[str, Any]:
    """A config group. The commonest one holds every linear map that is not named elsewhere."""
    scheme, expert = key
    targets = _patterns(names) if expert else [name for name in names if not common or name not in linears]
    return {
        "targets": [*targets, *(["Linear"] if common else [])],
        "weights": scheme.weights_config(),
        "input_activations": None,
        "output_activations": None,
        "format": format_of(scheme, expert=expert).name,
    }


def _patterns(experts: list[str]) -> list[str]:
    """One pattern for the experts of each projection, of all layers."""
    kinds = dict.fromkeys(name[name.rindex(".") + 1 :] for name in experts)
    return [f"re:.*\\.experts\\.\\d+\\.{re.escape(kind)}$" for kind in kinds]


FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))


def _fused_notes(schemes: Mapping[str, Scheme], linears: Mapping[str, None]) -> list[str]:
    """What vLLM, which fuses these projections, would object to."""
    for family in FUSED:
        for name in linears:
            stem, _, last = name.rpartition(".")
            siblings = [f"{stem}.{other}" for other in family]
            if last == family[0] and len({schemes.get(sibling) for sibling in siblings if sibling in linears}) > 1:
                return [f"vLLM fuses {', '.join(family)} and needs one scheme for them; they differ in {stem}"]
    return []
