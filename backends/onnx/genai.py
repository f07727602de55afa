"""What onnxruntime-genai needs beside a model, and which models it can run.

It holds one key and one value for each layer, whose names it makes by counting, and gives a model tokens and their
mask; so a model that keeps anything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.onnx.cache import PAST, PRESENT
from backends.onnx.fusion import position_limit
from compiler.errors import TargetError

if TYPE_CHECKING:
    from backends.onnx.emission import OnnxEmission
    from backends.onnx.lower import Lowered
    from compiler.ir.graph import Graph

FILE = "genai_config.json"
KEPT = ("key", "value")
SEARCH = {
    "do_sample": False, "early_stopping": True, "length_penalty": 1.0, "min_length": 0, "no_repeat_ngram_size": 0,
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
}  # fmt: skip


def require_generation(emission: OnnxEmission) -> None:
    """Raises TargetError with the reason when onnxruntime-genai cannot run what ``emission`` writes."""
    if emission.kind != "causal":
        _refuse("it runs language models with a cache of their own tokens, and this is none")
    cached = list(emission.models[emission.main].cached)
    wanted = [f"{layer}.{what}" for layer in range(len(cached) // 2) for what in KEPT]
    other = next((name for name in cached if name not in wanted), None)
    if other is not None:
        _refuse(f"it holds a key and a value for each layer, and this model `{other}`")
    if not position_limit(emission.graph):
        _refuse("it needs to know how many positions the model is made for, and the config does not say")


def _refuse(reason: str) -> None:
    raise TargetError(f"onnxruntime-genai cannot run the model: {reason}", remedy="write `target: ort-cpu`")


def genai_config(emission: OnnxEmission, given: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of genai_config.json. ``given`` is the checkpoint's generation config, if it has one."""
    model, graph = emission.models[emission.main], emission.graph
    logits = graph.outputs["logits"].shape[-1]
    (_, groups, _, width), heads = _shape(model, f"{PAST}.0.key"), _heads(graph)
    limit = position_limit(graph)
    tokens = {name: _token(emission.config, given, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = tokens["eos_token_id"]
    if tokens["pad_token_id"] is None:
        tokens["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": emission.main,
        "head_size": width,
        "hidden_size": heads * width,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **{f"past_{what}_names": f"{PAST}.%d.{what}" for what in KEPT},
        },
        "outputs": {"logits": "logits", **{f"present_{what}_names": f"{PRESENT}.%d.{what}" for what in KEPT}},
        "num_attention_heads": heads,
        "num_hidden_layers": len(model.cached) // 2,
        "num_key_value_heads": groups,
    }
    return {
        "model": {
            **{name: value for name, value in tokens.items() if value is not None},
            "context_length": limit,
            "decoder": decoder,
            "type": "decoder",
            "vocab_size": logits,
        },
        "search": {**SEARCH, "max_length": limit, "past_present_share_buffer": model.in_place},
    }


def _shape(model: Lowered, name: str) -> list[Any]:
    return next(list(value.shape or ()) for value in model.inputs if value.name == name)


def _heads(graph: Graph) -> int:
    return int(graph.nodes_named("attention")[0].input(0).shape[1])


def _token(config: Mapping[str, Any], given: Mapping[str, Any], name: str) -> Any:
    return given[name] if given.get(name) is not None else config.get(name)


def save_genai_config(emission: OnnxEmission, directory: Path) -> None:
    """Write the file beside the model that lies in ``directory``."""
    beside = directory / "generation_config.json"
    given = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    text = json.dumps(genai_config(emission, given), indent=2) + "\n"
    (directory / FILE).write_text(text, encoding="utf-8")
