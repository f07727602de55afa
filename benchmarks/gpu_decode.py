"""One step of decoding on the GPU of this machine: generated modules of an 8B model beside the stock class in bfloat16.

    python benchmarks/gpu_decode.py

Weights are random, as time does not depend on them. A step is one token after a context, for each of a batch. ``graph``
is a step captured in a CUDA graph, as servers run it, ``eager`` one that Python drives; both are medians.
``--prepare`` only writes the code of the models, which needs the compiler and no GPU; ``--models`` measures what was
written, which needs torch and transformers alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS = ((1, 2048), (1, 16384), (16, 2048))
ROUNDS = 12
STOCK = "bfloat16, stock"
INT4 = {"where": "linear", "bits": 4, "group": 128}
VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "int4": [("quantize", INT4)],
    "mla": [("gqa-to-mla", {})],
    "mla-int4": [("gqa-to-mla", {}), ("quantize", INT4)],
}


def config() -> LlamaConfig:
    """The shapes of Llama-3-8B."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rope_theta=500000.0,
        architectures=["LlamaForCausalLM"],
    )


def main() -> None:
    """Prepares, measures, or both."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", type=Path, default=ROOT / "out" / "benchmarks" / "gpu-decode")
    arguments.add_argument("--prepare", action="store_true", help="write the code and stop")
    arguments.add_argument("--json", type=Path, help="also write the rows to this file")
    chosen = arguments.parse_args()
    for name, passes in VARIANTS.items():
        if not (chosen.models / name / "config.json").exists():
            prepare(chosen.models / name, passes)
    if not chosen.prepare:
        measure(chosen.models, chosen.json)


def prepare(directory: Path, passes: list[tuple[str, dict[str, Any]]]) -> None:
    """Writes config and code of the compressed model, and no weights."""
    from backends.torch_module import generate
    from compiler import Pipeline, capture
    from passes import pass_class

    graph = capture(config())
    Pipeline([pass_class(name)(**options) for name, options in passes]).run(graph)
    made = generate(graph)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in made.files.items():
        (directory / name).write_text(text)
    (directory / "config.json").write_text(json.dumps(made.config))


def measure(models: Path, path: Path | None) -> None:
    """Prints seconds of a step and what each model keeps on the GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: not measured")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    rows = []
    for name in (STOCK, *VARIANTS):
        model = _model(None if name == STOCK else models / name)
        weights = torch.cuda.memory_allocated()
        for batch, context in CONTEXTS:
            graph, eager = _step_times(model, batch, context)
            rows.append({"model": name, "batch": batch, "context": context, "graph": graph, "eager": eager})
            times = f"graph {graph * 1e3:7.2f} ms  eager {eager * 1e3:7.2f} ms"
            print(f"{name:18} batch {batch:2} context {context:6}: {times}")
        print(f"{name:18} {weights / 1e9:.2f} GB on the GPU")
        rows[-1]["bytes"] = weights
        del model
        torch.cuda.empty_cache()
    if path:
        path.write_text(json.dumps(rows, indent=1))


def _model(directory: Path | None) -> nn.Module:
    with torch.device("cuda"):
        if directory is None:
            model = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)
        else:
            own = AutoConfig.from_pretrained(directory, trust_remote_code=True)
            model = AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16, trust_remote_code=True)
    for value in model.parameters():
        if not value.is_floating_point():
            value.data.random_(-(2**31), 2**31 - 1)
    return model.eval()


@torch.no_grad()
def _step_times(model: nn.Module, batch: int, context: int) -> tuple[float, float]:
    """Seconds of a step after ``context`` tokens, captured and not."""
    tokens = torch.randint(1000, 100000, (batch, context), device="cuda")
    cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    following = tokens[:, :1].contiguous()
    positions = torch.full((batch, 1), context, device="cuda")

    def step() -> None:
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        model(following, position_ids=positions, past_key_values=cache, use_cache=True)

    eager = _median(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return _median(graph.replay), eager


def _median(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
