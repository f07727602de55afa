"""Checkpoints of other runtimes as transformers directories, for fetch.py: Whisper of CTranslate2, DINOv2 of ONNX."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

CT2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

# Sub-layers of a CTranslate2 transformer layer, and what the linear maps of each are called in Whisper.
WHISPER_SUBLAYERS = {
    "self_attention": ("self_attn", (("q_proj", "k_proj", "v_proj"), ("out_proj",))),
    "attention": ("encoder_attn", (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))),
}
WHISPER_NAMES = [
    (r"/self_attention/layer_norm/", ".self_attn_layer_norm."),
    (r"/attention/layer_norm/", ".encoder_attn_layer_norm."),
    (r"/ffn/layer_norm/", ".final_layer_norm."),
    (r"/ffn/linear_0/", ".fc1."),
    (r"/ffn/linear_1/", ".fc2."),
    (r"layer_(\d+)", r"layers.\1"),
    (r"gamma$", "weight"),
    (r"beta$", "bias"),
    (r"position_encodings/encodings", "embed_positions.weight"),
    (r"embeddings/", "embed_tokens."),
    (r"/", "."),
]


def whisper(source: Path, target: Path) -> None:
    """Whisper tiny.en out of ``source`` (model.bin, config.json, tokenizer.json), in float16, into ``target``."""
    tensors = dict(whisper_tensors(source / "model.bin"))
    suppressed = json.loads((source / "config.json").read_text())
    config = transformers.WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=50256,
        decoder_start_token_id=50257,
    )
    model = transformers.WhisperForConditionalGeneration(config).half()
    fill(model, tensors, without={"proj_out.weight"})
    model.generation_config.suppress_tokens = suppressed["suppress_ids"]
    model.generation_config.begin_suppress_tokens = suppressed["suppress_ids_begin"]
    model.generation_config.no_timestamps_token_id = 50362
    model.save_pretrained(target)
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json")).save_pretrained(target)


def whisper_tensors(binary: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a CTranslate2 Whisper under transformers' names, stacked projections taken apart."""
    for name, tensor in ct2_tensors(binary):
        if not name.endswith(("weight", "bias", "gamma", "beta", "encodings")):
            continue
        prefix, sublayer, index, kind = split_projection(name)
        if sublayer in WHISPER_SUBLAYERS:
            module, linears = WHISPER_SUBLAYERS[sublayer]
            names = linears[index]
            for part, rows in zip(names, tensor.chunk(len(names)), strict=True):
                if (part, kind) != ("k_proj", "bias"):  # zero, and absent in transformers
                    yield f"model.{prefix}.{module}.{part}.{kind}", rows
        else:
            yield "model." + renamed(name), tensor


def split_projection(name: str) -> tuple[str, str, int, str]:
    """(layer, sub-layer, index, weight or bias) of an attention's linear map; empty for anything else."""
    found = re.fullmatch(r"(\w+)/layer_(\d+)/(\w*attention)/linear_(\d)/(weight|bias)", name)
    if found is None:
        return "", "", 0, ""
    stack, layer, sublayer, index, kind = found.groups()
    return f"{stack}.layers.{layer}", sublayer, int(index), kind


def renamed(name: str) -> str:
    for pattern, replacement in WHISPER_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def ct2_tensors(binary: Path) -> Iterator[tuple[str, Tensor]]:
    """The variables of a CTranslate2 file: name, rank, dims, dtype, bytes, each behind its length."""
    with binary.open("rb") as file:

        def number(kind: str) -> int:
            return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

        number("I")  # version of the format
        file.read(number("H"))  # name of the model's kind
        number("I")  # revision
        for _ in range(number("I")):
            name = file.read(number("H"))[:-1].decode()
            shape = [number("I") for _ in range(number("B"))]
            dtype = CT2_DTYPES[number("B")]
            values = np.frombuffer(bytearray(file.read(number("I"))), dtype)
            yield name, torch.from_numpy(values).reshape(shape)


def dinov2(source: Path, target: Path) -> None:
    """The DINOv2-small backbone inside the ONNX file ``source``, into ``target``. Needs the package onnx."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(source)).graph
    values = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    tensors = {name.removeprefix("backbone."): value for name, value in values.items() if name.startswith("backbone.")}
    for node in graph.node:
        weight = next((name for name in node.input if name.startswith("onnx::MatMul")), None)
        if weight is not None and node.name.startswith("/backbone/encoder/"):
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{path}.weight"] = values[weight].T.contiguous()
    first = next(value for name, value in values.items() if name.startswith("onnx::Concat"))
    others = next(value for name, value in values.items() if name.startswith("onnx::Reshape") and value.dim() == 3)
    tensors["embeddings.position_embeddings"] = torch.cat([first, others], dim=1)
    config = transformers.Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
        layer_norm_eps=1e-6,
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(target)
    tensors["embeddings.mask_token"] = torch.zeros(1, 384)  # used in training alone, and not in the file
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    _, found = transformers.Dinov2Model.from_pretrained(target, output_loading_info=True)
    if found["missing_keys"] or found["unexpected_keys"]:
        raise ValueError(f"missing {found['missing_keys']}, unexpected {found['unexpected_keys']}")


def fill(model: Any, tensors: dict[str, Tensor], without: set[str]) -> None:
    """Load ``tensors``, which must be all that ``model`` has but ``without``."""
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if set(missing) != without or unexpected:
        raise ValueError(f"missing {sorted(set(missing) - without)}, unexpected {unexpected}")
    model.tie_weights()
