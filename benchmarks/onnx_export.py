"""What writing an ONNX model takes: SmolLM2-135M by us and by torch.onnx.export, and one as wide as Llama-2-7B by us.

    python benchmarks/onnx_export.py [--wide LAYERS]

Each is a process of its own: seconds on the processors and the most resident memory. torch exports the model without a
cache, which is less than what we write. The wide model's checkpoint is a file of zeros that takes no room on a disk;
its matrices become four bits in blocks of 32, and it has LAYERS of the 32 layers, whose weights are written one by one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import WORK, run, show

WIDE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def ours(model: Path, directory: Path, bits: int) -> None:
    from backends.onnx import emit, propose
    from compiler.frontend.capture import capture
    from compiler.pipeline import Pipeline
    from passes import Quantize

    graph = capture(model)
    if bits:
        Pipeline([Quantize(where="linear", bits=bits, group=32)]).run(graph)
    emit(propose(graph), graph.sources, directory)


def by_torch(model: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.config.use_cache = False
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("sequence", max=2048)}
    ids = torch.ones(2, 8, dtype=torch.int64)
    with torch.no_grad():
        program = torch.onnx.export(
            loaded, (ids,), dynamo=True, opset_version=23, dynamic_shapes=(sizes,), verbose=False
        )
    assert program is not None
    program.save(directory / "model.onnx", external_data=True)


def zeros(directory: Path, layers: int) -> Path:
    """A checkpoint of zeros in bfloat16."""
    (directory / "config.json").write_text(json.dumps({**WIDE, "num_hidden_layers": layers}))
    width, inner, words = WIDE["hidden_size"], WIDE["intermediate_size"], WIDE["vocab_size"]
    shapes = {
        "model.embed_tokens.weight": [words, width],
        "lm_head.weight": [words, width],
        "model.norm.weight": [width],
    }
    for layer in range(layers):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{name}_proj.weight": [width, width] for name in "qkvo"}
        shapes |= {f"{start}.mlp.{name}_proj.weight": [inner, width] for name in ("gate", "up")}
        shapes |= {f"{start}.mlp.down_proj.weight": [width, inner]}
        shapes |= {f"{start}.{name}_layernorm.weight": [width] for name in ("input", "post_attention")}
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + 2 * prod(shape)
        header[name], place = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    return directory


def measured(*arguments: str) -> list[str]:
    with tempfile.TemporaryDirectory(dir=WORK) as out:
        found = run([sys.executable, __file__, *arguments, "--out", out], OMP_NUM_THREADS="1")
    return [f"{found.cpu_seconds:.0f}", f"{found.seconds:.0f}", f"{found.peak_rss / 1e9:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", type=int, default=0, metavar="LAYERS")
    parser.add_argument("--one", choices=["ours", "torch"], help="in this process")
    parser.add_argument("--model", type=Path, default=WORK / "onnx" / "hf")
    parser.add_argument("--bits", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one == "ours":
        ours(options.model, options.out, options.bits)
    elif options.one == "torch":
        by_torch(options.model, options.out)
    else:
        rows = [["", "CPU s", "s", "most memory, GB"]]
        if options.wide:
            with tempfile.TemporaryDirectory(dir=WORK) as folder:
                path = zeros(Path(folder), options.wide)
                name = f"ours, as wide as 7B, {options.wide} layers, int4"
                rows.append([name, *measured("--one", "ours", "--model", str(path), "--bits", "4")])
        else:
            rows += [
                [f"{one}, fp32", *measured("--one", one, "--model", str(options.model))] for one in ("ours", "torch")
            ]
        show("Writing an ONNX model", rows)


if __name__ == "__main__":
    main()
