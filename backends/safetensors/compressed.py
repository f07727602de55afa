"""The ``quantization_config`` with which compressed-tensors finds the quantised weights of a model."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

import torch

from backends.safetensors.cache import Cache
from backends.safetensors.formats import Scheme, format_of, int_quantized, pack_quantized, scheme_of
from backends.safetensors.parts import EXPERT
from backends.safetensors.rounding import Rounding
from backends.safetensors.unify import Mismatch
from compiler.ir.graph import Param
from compiler.weights.expr import Expr
from compiler.weights.ops.codec import is_quantised
from compiler.weights.rows import as_dequantize

WORD = 32  # bits of the words that codes are packed into
UNKNOWN = {
    "codebook": "codebooks",
    "real": "zero points that are no integers",
    "stack": "stacks of blocks",
    "e3m2": "e3m2 floats (only e2m3)",
}
"""Kinds of quantised weights that compressed-tensors does not have."""
ONE_SCHEME = "transformers reads all experts of a model by one scheme"


@dataclass(frozen=True)
class Quantised:
    """The ``quantization_config`` of config.json, and runtimes that cannot read it."""

    config: Mapping[str, Any]
    notes: tuple[str, ...]


def quantization_config(
    named: Mapping[str, Expr],
    stored: Mapping[str, Expr],
    module: Any,
    activations: Mapping[str, Rounding],
    cache: Cache | None = None,
) -> Quantised | Mismatch | None:
    """The config for ``module``, whose tensors are ``named``, and ``stored`` under the names of its checkpoint.

    ``activations`` says how what weights multiply is rounded, by the weights' names, ``cache`` what is cached.

    None when all are dense. A Mismatch says which weight cannot be stored, or why transformers could not load it.
    ``module`` is on the meta device and not to be used afterwards.
    """
    dense = [name for name in activations if as_dequantize(named[name]) is None]
    if dense:
        return Mismatch(f"what {dense[0]} multiplies is rounded, and the weight is not; quantise it too")
    renamed = [name for name, how in activations.items() if how.scale and name not in stored]
    if renamed:
        return Mismatch(f"files hold {renamed[0]} under another name, where no scale of what it multiplies is read")
    several = next((name for name, expr in named.items() if _has_several_widths(expr)), None)
    if several is not None:
        return Mismatch(f"the experts of {several} have several widths: {ONE_SCHEME}")
    found = _described(named, stored, _names(module, "Linear"), _names(module, "Embedding"), activations)
    if cache is not None:
        found = _with_cache(found, cache)
    odd = _of_other_dtype(stored) if isinstance(found, Quantised) and not found.config.get("dequantize") else None
    if odd:
        return Mismatch(f"transformers makes bfloat16 of {odd}, which is not what the model computes in")
    return _rehearsed(found, module) if isinstance(found, Quantised) else found


def _has_several_widths(expr: Expr) -> bool:
    """Whether ``expr`` is a stack of experts of several widths, as it is or rearranged."""
    return expr.op == "dequantize_experts" or (not is_quantised(expr) and any(map(_has_several_widths, expr.args)))


def _with_cache(found: Quantised | Mismatch | None, cache: Cache) -> Quantised | Mismatch:
    """The config of a model that rounds what it caches; transformers then dequantises in the first forward pass."""
    if found is None:
        return Mismatch("what is cached is rounded, and no weight is; quantise weights too")
    if isinstance(found, Mismatch):
        return found
    groups = found.config["config_groups"].values()
    if any(group["format"] == pack_quantized.FORMAT.name and not group["weights"]["symmetric"] for group in groups):
        return Mismatch("transformers reads packed zero points only of models with exact caches; make them symmetric")
    config = {key: value for key, value in found.config.items() if key != "dequantize"}
    return Quantised({**config, "kv_cache_scheme": cache.config}, found.notes)


def config_of_generated(tensors: Mapping[str, Param]) -> Quantised | Mismatch | None:
    """The config for a class written for ``tensors``, which are by name. transformers dequantises while it loads."""
    exprs = {name: param.expr for name, param in tensors.items()}
    linears, tables = (_modules(tensors, *kinds) for kinds in (("linear", "latent_attention"), ("embedding",)))
    found = _described(exprs, exprs, linears, tables, {})
    if isinstance(found, Quantised) and not found.config.get("dequantize"):
        return Mismatch("its weights are quantised in several ways; generated code loads one scheme for all weights")
    return found


def _modules(tensors: Mapping[str, Param], *kinds: str) -> dict[str, None]:
    """The modules whose weights operations of ``kinds`` read."""
    found = (name for name, param in tensors.items() if any(node.op.name in kinds for node in param.users))
    return dict.fromkeys(name.removesuffix(".weight") for name in found if name.endswith(".weight"))


def _described(
    named: Mapping[str, Expr],
    stored: Mapping[str, Expr],
    linears: Mapping[str, None],
    embeddings: Mapping[str, None],
    activations: Mapping[str, Rounding],
) -> Quantised | Mismatch | None:
    dense: set[str] = set()
    for key, expr in stored.items():
        quantised = as_dequantize(expr) is not None
        if not quantised and not is_dense(expr, dense):
            return Mismatch(f"{key} would be quantised in part, or along its rows; give it one scheme, or skip it")
        if quantised and not key.endswith(".weight"):
            return Mismatch(f"{key} is quantised, and only the weights of modules can be stored so; skip it")
    schemes = _schemes(named, keep=lambda name: EXPERT.search(name) is None)
    schemes |= {
        module: replace(schemes[module], inputs=how.kind)
        for name, how in activations.items()
        if (module := name.removesuffix(".weight")) in schemes
    }
    experts = _schemes(stored, keep=lambda name: EXPERT.search(name) is not None)
    plain = [
        key
        for key, expr in stored.items()
        if EXPERT.search(key) and expr.type.rank == 2 and as_dequantize(expr) is None
    ]
    if plain and (schemes or experts):
        return Mismatch(f"transformers reads no dense experts ({plain[0]}) beside quantised weights; quantise them too")
    for name, scheme in {**schemes, **experts}.items():
        if scheme.kind in UNKNOWN:
            return Mismatch(f"compressed-tensors has no {UNKNOWN[scheme.kind]}, as {name} needs")
    strange = [name for name in schemes if name not in linears and name not in embeddings]
    if strange:
        return Mismatch(f"{strange[0]} is quantised, and it is neither a linear module nor an embedding; skip it")
    odd = _without_a_module(named, stored, schemes)
    if odd is not None:
        return Mismatch(f"{odd} is quantised, and it is no weight of a linear module or an expert; skip it")
    short = _too_short({**schemes, **experts}, stored)
    if short:
        return Mismatch(f"{short} has too few rows: transformers cannot read its packed zero points; skip it")
    return _config(schemes, experts, linears) if schemes or experts else None


def _rehearsed(found: Quantised, module: Any) -> Quantised | Mismatch:
    """``found``, once transformers has prepared ``module`` for such a checkpoint: not every class can be."""
    from transformers import CompressedTensorsConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    try:
        with redirect_stderr(io.StringIO()):
            quantizer = CompressedTensorsHfQuantizer(CompressedTensorsConfig(**found.config), pre_quantized=True)
            quantizer.validate_environment()
            quantizer.preprocess_model(module)
            get_model_conversion_mapping(module, hf_quantizer=quantizer)
            for tensor in (*module.parameters(), *module.buffers()):
                tensor._is_hf_initialized = True  # as loading marks them; some classes look at weights regardless
            module.initialize_weights()
    except (AttributeError, ValueError, RuntimeError) as reason:
        one = "" if found.config.get("dequantize") else "; it may load with one scheme for all weights"
        return Mismatch(f"transformers cannot load {type(module).__name__} quantised like this: {reason}{one}")
    return found


def _names(module: Any, kind: str) -> dict[str, None]:
    """The modules of a class of torch.nn."""
    from torch import nn

    return dict.fromkeys(name for name, child in module.named_modules() if isinstance(child, getattr(nn, kind)))


def _schemes(tensors: Mapping[str, Expr], keep: Callable[[str], bool]) -> dict[str, Scheme]:
    """The scheme of every quantised weight by the name of its module."""
    values = {name: as_dequantize(expr) for name, expr in tensors.items() if name.endswith(".weight") and keep(name)}
    return {name.removesuffix(".weight"): scheme_of(value) for name, value in values.items() if value is not None}


def is_dense(expr: Expr, known: set[str]) -> bool:
    """Whether nothing in ``expr`` is dequantised; ``known`` are the keys of expressions of which that is known."""
    if expr.key not in known and not is_quantised(expr) and all(is_dense(arg, known) for arg in expr.args):
        known.add(expr.key)
    return expr.key in known


def _config(
    schemes: Mapping[str, Scheme], experts: Mapping[str, Scheme], linears: Mapping[str, None]
) -> Quantised | Mismatch:
    by_scheme = {(scheme, False): _of(scheme, schemes) for scheme in dict.fromkeys(schemes.values())}
    by_scheme |= {(scheme, True): _of(scheme, experts) for scheme in dict.fromkeys(experts.values())}
    reason = _unloadable(list(by_scheme))
    if reason:
        return Mismatch(reason)
    common = max(by_scheme, key=lambda key: sum(name in linears for name in by_scheme[key]))
    ordered = sorted(by_scheme, key=lambda key: key == common)  # names before the class: loaders take the first match
    described = [_group(key, by_scheme[key], linears, key == common) for key in ordered]
    formats = {group["format"] for group in described}
    config = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{index}": group for index, group in enumerate(described)},
        "ignore": [name for name in linears if name not in schemes],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if not _is_late(by_scheme):
        # read by transformers alone: it then dequantises while loading, which works for every class and with zero
        # points, where its other way, to dequantise in the first forward pass, does not
        config["dequantize"] = True
    return Quantised(config, (*_format_notes(described), *_fused_notes(schemes, linears)))


def _of(scheme: Scheme, schemes: Mapping[str, Scheme]) -> list[str]:
    return [name for name, other in schemes.items() if other == scheme]


def _unloadable(schemes: list[tuple[Scheme, bool]]) -> str:
    """Why transformers cannot load a model with weights of these schemes (and whether they are experts); "" if it can.

    Without zero points for experts, and for one scheme at a time when it dequantises while loading.
    """
    reasons = [_unreadable_experts(scheme) for scheme, expert in schemes if expert]
    if any(reasons):
        return next(filter(None, reasons))
    if sum(expert for _, expert in schemes) > 1:
        return f"{ONE_SCHEME}; `skip` some, or give them all one width"
    if _is_late(schemes) and any(_has_packed_zeros(*key) for key in schemes):
        which = "one scheme" if len(schemes) > 1 else "exact activations"
        return f"transformers reads packed zero points only of models with {which}; make the weights symmetric"
    return ""


def _is_late(schemes: Collection[tuple[Scheme, bool]]) -> bool:
    """Whether transformers dequantises in the first forward pass.

    While loading, which it would do otherwise, it can read one scheme for all modules, and forgets about activations.
    """
    return len(schemes) > 1 or any(expert or scheme.inputs is not None for scheme, expert in schemes)


def _unreadable_experts(scheme: Scheme) -> str:
    """Why transformers cannot load experts of ``scheme``; "" if it can."""
    if not scheme.symmetric:
        return "transformers reads no zero points of experts; make them symmetric"
    if scheme.kind == "fp8" and (scheme.rows > 1 or scheme.group):
        return "transformers reads experts of fp8 with one scale a row, or a matrix"
    name = f"{scheme.kind}fp{scheme.bits}" if scheme.kind == "mx" else scheme.kind
    return f"transformers reads no experts of {name}" if name in ("mxfp6", "mxfp8", "nvfp4") else ""


def _of_other_dtype(stored: Mapping[str, Expr]) -> str | None:
    """A weight of another dtype than that which transformers gives it in the first forward pass."""
    values = {name: as_dequantize(expr) for name, expr in stored.items() if expr.dtype != torch.bfloat16}
    return next((name for name, value in values.items() if value and scheme_of(value).kind in ("mx", "nvfp4")), None)


def _without_a_module(
    named: Mapping[str, Expr], stored: Mapping[str, Expr], schemes: Mapping[str, Scheme]
) -> str | None:
    """A quantised weight that is neither an expert nor, under its own or another name, one of a module's."""
    names = {f"{name}.weight" for name in schemes}
    known = {named[name].key for name in names}
    odd = (key for key, expr in stored.items() if as_dequantize(expr) is not None and not EXPERT.search(key))
    return next((key for key in odd if key not in names and stored[key].key not in known), None)


def _too_short(schemes: Mapping[str, Scheme], stored: Mapping[str, Expr]) -> str | None:
    """A weight whose zero points, packed along its rows, are a single row of words, which transformers cannot read."""
    for name, scheme in schemes.items():
        expr = stored.get(f"{name}.weight")
        if expr is not None and _has_packed_zeros(scheme, False) and expr.shape[-2] * scheme.bits <= WORD:
            return f"{name}.weight"
    return None


def _has_packed_zeros(scheme: Scheme, expert: bool) -> bool:
    return not scheme.symmetric and format_of(scheme, expert=expert) is pack_quantized.FORMAT


def _group(key: tuple[Scheme, bool], names: list[str], linears: Mapping[str, None], common: bool) -> dict[str, Any]:
    """A config group. The commonest one holds every linear map that is not named elsewhere."""
    scheme, expert = key
    targets = _patterns(names) if expert else [name for name in names if not common or name not in linears]
    return {
        "targets": [*targets, *(["Linear"] if common else [])],
        "weights": scheme.weights_config(),
        "input_activations": None if scheme.inputs is None else scheme.inputs.config(),
        "output_activations": None,
        "format": format_of(scheme, expert=expert).name,
    }


def _patterns(experts: list[str]) -> list[str]:
    """One pattern for the experts of each projection, of all layers."""
    kinds = dict.fromkeys(name[name.rindex(".") + 1 :] for name in experts)
    return [f"re:.*\\.experts\\.\\d+\\.{re.escape(kind)}$" for kind in kinds]


def _format_notes(groups: list[dict[str, Any]]) -> list[str]:
    formats = [group["format"] for group in groups if group["input_activations"] is None]
    plain = int_quantized.FORMAT.name in formats
    return ["vLLM reads int-quantized weights only where activations are quantised too"] if plain else []


FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))


def _fused_notes(schemes: Mapping[str, Scheme], linears: Mapping[str, None]) -> list[str]:
    """What vLLM, which fuses these projections, would object to."""
    for family in FUSED:
        for name in linears:
            stem, _, last = name.rpartition(".")
            siblings = [f"{stem}.{other}" for other in family]
            if last == family[0] and len({schemes.get(sibling) for sibling in siblings if sibling in linears}) > 1:
                return [f"vLLM needs one scheme for {', '.join(family)}, which differ in {stem}"]
    return []
