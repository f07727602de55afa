"""The layout of GPTQ checkpoints, which GPTQModel, transformers with it, vLLM, SGLang and others read.

For a matrix [out, in] in groups of inputs: ``qweight`` int32 [in * bits / 32, out], codes packed along inputs,
``scales`` float16 [groups, out], ``qzeros`` int32 [groups, out * bits / 32], zero points packed along outputs, less one
in the first version of the layout, and ``g_idx`` int32 [in], the group of every input. Codes and zero points are
unsigned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch

from backends.safetensors.compressed import Quantised, is_dense
from backends.safetensors.formats.scheme import Scheme, scheme_of
from backends.safetensors.unify import Mismatch
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import full, literal, repeat, transpose
from compiler.weights.ops.closely import cast_closely
from compiler.weights.ops.quant import pack_bits
from compiler.weights.rows import as_dequantize

Version = Literal["gptq", "gptq-v2"]
BITS = (2, 3, 4, 8)
WORD = 32
PACKAGES = ("optimum", "gptqmodel")
EXACT_SCALES = (torch.float16, torch.bfloat16)  # float16 holds bfloat16 scales but for very small and large ones
NARROW = "`skip` the weight, or leave out `quantised-as`: compressed-tensors keeps the scales' own dtype"


def gptq_parts_of(version: Version) -> Callable[[str, Expr], dict[str, Expr]]:
    """What makes the tensors of the file that stand for an expression under a key: itself, or its parts."""
    return partial(_parts, version)


def _parts(version: Version, key: str, expr: Expr) -> dict[str, Expr]:
    value = as_dequantize(expr)
    if value is None:
        return {key: expr}
    codes, scale, *zeros = value.args
    bits, groups, (_, width) = value.attr("bits"), scale.shape[-1], value.shape
    none = full(scale.shape, -1 if version == "gptq" else 0, torch.int8)
    parts = {
        "qweight": pack_bits(transpose(codes), bits, axis=-2),
        "qzeros": pack_bits(transpose(zeros[0] if zeros else none), bits),
        "scales": cast_closely(transpose(scale), torch.float16, f"scales of {key}", NARROW),
        "g_idx": repeat(literal(range(groups), dtype=torch.int32), 0, width // groups),
    }
    return {key.removesuffix("weight") + name: part for name, part in parts.items()}


def missing_packages(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What transformers needs to load a checkpoint with this ``quantization_config``, and is not installed."""
    needed = PACKAGES if config is not None and config["quant_method"] == "gptq" else ()
    return tuple(name for name in needed if find_spec(name) is None)


def gptq_config(
    named: Mapping[str, Expr], stored: Mapping[str, Expr], module: Any, rounds: bool, version: Version
) -> Quantised | Mismatch | None:
    """The config for weights ``named`` as in ``module``, and ``stored`` by their checkpoint's names; None when all are
    dense.

    ``rounds``: activations are rounded. A Mismatch says what the layout cannot hold.
    """
    values = {key: value for key, expr in stored.items() if (value := as_dequantize(expr)) is not None}
    dense: set[str] = set()
    turned = next((key for key, expr in stored.items() if key not in values and not is_dense(expr, dense)), None)
    if turned is not None:
        return Mismatch(f"{turned} is quantised in part, or stored transposed, as no GPTQ checkpoint is; skip it")
    schemes = {scheme_of(value) for value in values.values()}
    if not schemes:
        return None
    if rounds:
        return Mismatch("GPTQ checkpoints have no rounded activations")
    if len(schemes) > 1:
        return Mismatch("GPTQ checkpoints have one scheme for all weights; `compressed-tensors` has several")
    scheme = schemes.pop()
    linears = [name for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)]
    weights = {name: value for name, expr in named.items() if (value := as_dequantize(expr)) is not None}
    unfit = (_unfit(name, value, linears) for name, value in weights.items())
    reason = _refusal(scheme, version) or next(filter(None, unfit), "")
    if reason:
        return Mismatch(reason)
    left = [name for name in linears if f"{name}.weight" not in weights]
    config = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group or -1,
        "desc_act": False,
        "sym": scheme.symmetric,
        "checkpoint_format": version.replace("-", "_"),
        "lm_head": any(name.rpartition(".")[2] == "lm_head" and name not in left for name in linears),
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in left},
    }
    return Quantised(config, ())


def _refusal(scheme: Scheme, version: Version) -> str:
    """Why the layout cannot hold ``scheme``; "" when it can."""
    if scheme.kind != "int" or scheme.bits not in BITS:
        return f"GPTQ checkpoints hold integers of {', '.join(map(str, BITS))} bits"
    if version == "gptq" and not scheme.symmetric:
        return "the first version of the GPTQ layout cannot hold every zero point; `gptq-v2` can"
    return ""


def _unfit(name: str, value: Expr, linears: Collection[str]) -> str:
    """Why a weight cannot be stored in the layout; "" when it can."""
    rows, width = value.shape[-2:]
    if name.removesuffix(".weight") not in linears:
        return f"GPTQ checkpoints hold the weights of linear modules; skip {name}"
    if rows % WORD or width % WORD:
        return f"{name} is {rows} x {width}, and both must be multiples of {WORD}; skip it"
    if value.dtype not in EXACT_SCALES:
        return f"{name} has scales of {value.dtype}, which float16, that of the layout, does not hold exactly"
    return ""
