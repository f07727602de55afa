"""Tiny models and recipes that the campaign works on; an undisturbed run of each takes a second or two."""

from __future__ import annotations

import json
import math
import struct
import wave
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from tests.small import write_folder, write_recipe
from tests.tiny import byte_tokenizer

CALIBRATION = "calibration: {data: text.txt, samples: 4, length: 32}\n"
EVALUATION = "evaluate: {data: text.txt, samples: 2, length: 16}\n"
MIXTURE, EXPERTS = "mixture", "experts"
RECIPES = {
    "quantize": ("[quantize: {bits: 4, group: 16, method: gptq, skip: [lm_head]}]", CALIBRATION),
    "mla": ("[gqa-to-mla: {cache: 50%}]", CALIBRATION),
    "low-rank": ("[low-rank: {keep: 70%}, heal: {layer-tokens: 512, tokens: 512}]", CALIBRATION),
    "prune": ("[prune: {what: channels, keep: 50%, align: 16}]", CALIBRATION),
    "onnx": ("[quantize: {bits: 4, group: 32}]", "emit: [safetensors, onnx]\n"),
    "generated": (
        "[quantize: {bits: 3, group: 16, symmetric: false, zeros: real}]",
        "emit: [safetensors: {class: generated}]\n",
    ),
    "gguf": ("[quantize: {type: q4_0}]", EVALUATION + "emit: [gguf]\n"),
    EXPERTS: (
        "[quantize: {where: experts, bits: 2.5, group: 16, experts: apart, method: gptq}]",
        CALIBRATION,
    ),
}
VARYING = ("timings.json",)
"""Files that hold times, which no two runs share."""
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_subjects(folder: Path) -> dict[str, Path]:
    """The models, the text and all recipes in ``folder``; recipes by name."""
    byte_tokenizer(words=True).save_pretrained(write_folder(folder) / "tiny")
    _write_mixture(folder / MIXTURE)
    models = {EXPERTS: MIXTURE}
    return {
        name: write_recipe(folder, *parts, name=f"{name}.yaml", model=models.get(name, "tiny"))
        for name, parts in RECIPES.items()
    }


def _write_mixture(path: Path) -> None:
    """A random model with four experts a layer, two of them for each token."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    options = {"vocab_size": 256, "num_hidden_layers": 2, "num_local_experts": 4, "max_position_embeddings": 256}
    MixtralForCausalLM(MixtralConfig(**sizes, **options)).to(torch.bfloat16).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def contents(directory: Path) -> dict[str, bytes]:
    """All files below ``directory`` but for those that vary."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in VARYING)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def difference(found: dict[str, bytes], expected: dict[str, bytes]) -> str:
    """What differs between two outputs, in words; nothing when they are the same."""
    if found.keys() != expected.keys():
        return f"files {sorted(found.keys() ^ expected.keys())} are in one only"
    return ", ".join(f"{name} differs" for name in found if found[name] != expected[name])


def write_sharded(path: Path) -> Path:
    """A checkpoint of two shards with an index."""
    path.mkdir()
    tensors = {f"layers.{i}.w": torch.full((4, 8), float(i)) for i in range(8)}
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    for name, half in zip(SHARDS, (range(4), range(4, 8)), strict=True):
        save_file({f"layers.{i}.w": tensors[f"layers.{i}.w"] for i in half}, path / name)
    weight_map = {f"layers.{i}.w": SHARDS[i // 4] for i in range(8)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def write_latencies(folder: Path) -> Path:
    """A table of latencies, in a folder of its own."""
    path = folder / "latencies" / "table.json"
    path.parent.mkdir()
    table = {"runtime": "onnxruntime", "microseconds": {f"linear(f32[1,{n},64], @f32[64,64])": n / 3 for n in range(6)}}
    path.write_text(json.dumps(table))
    return path


def write_wave(path: Path) -> Path:
    """A tenth of a second of a tone."""
    path.parent.mkdir()
    samples = [int(9000 * math.sin(n / 9)) for n in range(1600)]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples))
    return path
