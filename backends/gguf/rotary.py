"""Rotary embedding as GGUF files say it: the base, and how frequencies are scaled for longer texts.

Linear scaling and YaRN are entries of the header, from which llama.cpp computes what transformers computes. Of Llama 3
the file has a tensor: what the frequency of each pair is divided by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compiler.weights.expr import Expr
from compiler.weights.ops.basic import literal

Config = Mapping[str, Any]

DIVISORS = "rope_freqs.weight"
DIVIDED = ("llama",)  # architectures that read divisors
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
BY_HAND = ("attention_factor", "mscale", "mscale_all_dim")  # other factors of scores than YaRN's own


def head_width(config: Config) -> int:
    """Elements of a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def refusal(architecture: str, config: Config) -> str:
    """Why llama.cpp's ``architecture`` does not rotate as ``config`` says; "" where it does."""
    own = _entries(config)
    kind = own.get("rope_type", "default")
    if float(own.get("partial_rotary_factor") or 1.0) != 1.0:
        return "rotary embedding of a part of a head is not written yet"
    if kind == "llama3" and architecture not in DIVIDED:
        return f"its architecture {architecture} has no rotary embedding of the type {kind}"
    if kind == "yarn" and (own.get("truncate") is False or any(own.get(name) is not None for name in BY_HAND)):
        return "its rotary embedding scales by other factors than YaRN's"
    if kind not in ("default", "linear", "llama3", "yarn"):
        return f"rotary embedding of the type {kind} is not written yet"
    return ""


def metadata(config: Config) -> dict[str, Any]:
    """Entries of the header, without the architecture's name."""
    own = _entries(config)
    found: dict[str, Any] = {"rope.dimension_count": head_width(config), "rope.freq_base": _base(config)}
    kind = own.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(own["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = int(own["original_max_position_embeddings"])
        found |= {f"rope.scaling.yarn_{name}": float(own.get(name) or usual) for name, usual in YARN.items()}
    return found


def tensors(config: Config) -> dict[str, Expr]:
    """Tensors of the file that no checkpoint has: what Llama 3 divides frequencies by, float32 [pairs]."""
    own = _entries(config)
    return {DIVISORS: literal(_divisors(own, _base(config), head_width(config)))} if _is_llama3(own) else {}


def _is_llama3(own: Config) -> bool:
    return own.get("rope_type") == "llama3"


def _entries(config: Config) -> Config:
    """The rotary entries that layers with full attention have."""
    found = config.get("rope_parameters") or {}
    return found.get("full_attention", found)


def _base(config: Config) -> float:
    return float(_entries(config).get("rope_theta") or config.get("rope_theta") or 10000.0)


def _divisors(own: Config, base: float, width: int) -> list[float]:
    """One for wavelengths that the original context holds often, ``factor`` for long ones, between them in between."""
    low, high, factor = float(own["low_freq_factor"]), float(own["high_freq_factor"]), float(own["factor"])
    found: list[float] = []
    for pair in range(0, width, 2):
        turns = own["original_max_position_embeddings"] / (2 * math.pi * base ** (pair / width))
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - kept) / factor + kept))
    return found
