"""SmolLM2-135M decoding in ONNX Runtime, in turns with the models of onnxruntime-genai's builder and with transformers.

    python benchmarks/onnx_speed.py [--threads 1] [--prompts 128 1024 4096] [--genai DIR ...]

Each DIR holds a model that `python -m onnxruntime_genai.models.builder -i HF -o DIR -p int4 -e cpu` wrote, from the
checkpoint HF that this script writes to out/benchmarks/onnx/hf. It is run by the loop that runs ours, and with
`--genai-runtime` by onnxruntime-genai too, so that models and runtimes are compared apart. Every engine takes one token
in turn. On a machine with other work look at processor time; with one thread it is what a token takes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backends.onnx.runner import Runner
from benchmarks.common import ROOT, SMOLLM2, WORK, run
from compiler.console import table

PASSES: dict[str, str] = {
    "fp32": "[]",
    "int4, blocks of 32": "[quantize: {where: linear, bits: 4, group: 32, tied: copy}]",
    "int4, blocks of 64": "[quantize: {where: linear, bits: 4, group: 64, tied: copy}]",
    "int4, blocks of 32, cache int8": "[quantize: {where: linear, bits: 4, group: 32, tied: copy, cache: int8}]",
    "int4, blocks of 32, zero points": "[quantize: {where: linear, bits: 4, group: 32, symmetric: false, tied: copy}]",
    "latent half, int4 of 32": "[gqa-to-mla: {rank: 128, rope-dim: 64},"
    " quantize: {where: linear, bits: 4, group: 32, tied: copy}]",
}
CALIBRATED = ("int4, blocks of 32, cache int8", "latent half, int4 of 32")
TEXT = ROOT / "data" / "brown_a.txt"
BUILT_FROM = "hf"
Taken = tuple[float, float]


class Built(Runner):
    """A model of the builder, which leaves the width of heads out of its inputs and writes its cache in place."""

    width = 64

    def __init__(self, path: Path, *, threads: int) -> None:
        super().__init__(path, threads=threads)
        self._in_place, self._scores_last = True, False

    def _empty(self, batch: int) -> dict[str, Any]:
        shapes = {value.name: (batch, value.shape[1], 0, self.width) for value in self._past}
        return {name: self._value(np.zeros(shape, np.float32)) for name, shape in shapes.items()}


def written(names: Sequence[str]) -> dict[str, Path]:
    """Ours, written where they are not yet, and the checkpoint that the builder takes."""
    folder = WORK / "onnx"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    for name in (*names, BUILT_FROM):
        emit = "[safetensors]" if name == BUILT_FROM else "[onnx]"
        out = folder / name.replace(" ", "-").replace(",", "")
        if not out.is_dir():
            recipe = out.with_suffix(".yaml")
            text = f"calibration: {{data: {TEXT}, samples: 8, length: 256}}\n" if name in CALIBRATED else ""
            recipe.write_text(f"model: {SMOLLM2}\n{text}passes: {PASSES.get(name, '[]')}\nemit: {emit}\n")
            run([sys.executable, "-m", "compiler.cli", str(recipe), "-o", str(out)])
        if name != BUILT_FROM:
            found[name] = out / "onnx" / "model.onnx"
    return found


def by_genai(directory: Path, ids: Sequence[int], count: int, threads: int) -> Iterator[int]:
    """Tokens of a model by onnxruntime-genai's own loop."""
    import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]

    config = og.Config(str(directory))
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
    params = og.GeneratorParams(model := og.Model(config))
    params.set_search_options(max_length=len(ids) + count + 1, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([ids], dtype=np.int32))
    for _ in range(count):
        generator.generate_next_token()
        yield int(generator.get_sequence(0)[-1])


def by_transformers(ids: Sequence[int], count: int, threads: int) -> Iterator[int]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(WORK / "onnx" / BUILT_FROM, dtype=torch.float32).eval()
    given, cache = torch.tensor([list(ids)]), None
    for _ in range(count):
        with torch.inference_mode():
            result = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, given = result.past_key_values, result.logits[:, -1:].argmax(-1)
        yield int(given)


def in_turns(engines: dict[str, Iterator[Any]], count: int) -> dict[str, list[Taken]]:
    """Seconds on the processors and on the clock for each token of each engine; the first token reads the prompt."""
    taken: dict[str, list[Taken]] = {name: [] for name in engines}
    for _ in range(count):
        for name, tokens in engines.items():
            cpu, wall = time.process_time(), time.perf_counter()
            next(tokens)
            taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return taken


def measure(options: argparse.Namespace, length: int) -> None:
    ids = [random.Random(0).randrange(10, 40000) for _ in range(length)]
    count = options.tokens + 1
    ours = {name: Runner(path, threads=options.threads) for name, path in written(options.models).items()}
    engines: dict[str, Iterator[Any]] = {name: runner.greedy(ids, count) for name, runner in ours.items()}
    for directory in options.genai:
        engines[f"{directory.name}: genai's model, our loop"] = Built(
            directory / "model.onnx", threads=options.threads
        ).greedy(ids, count)
        if options.genai_runtime:
            engines[f"{directory.name}: genai's own loop"] = by_genai(directory, ids, count, options.threads)
    if options.transformers:
        engines["transformers, fp32"] = by_transformers(ids, count, options.threads)
    rows = [("", "prompt, CPU ms", "a token, CPU ms", "least", "tokens/s, clock")]
    for name, seconds in in_turns(engines, count).items():
        cpu, wall = [each[0] for each in seconds[1:]], [each[1] for each in seconds[1:]]
        shown = (seconds[0][0] * 1e3, statistics.median(cpu) * 1e3, min(cpu) * 1e3, 1 / statistics.median(wall))
        rows.append((name, f"{shown[0]:.0f}", *(f"{value:.2f}" for value in shown[1:3]), f"{shown[3]:.1f}"))
    print(f"\n{options.threads} thread(s), {length} tokens of prompt, {options.tokens} new ones")
    print(table(rows))


def reload(name: str) -> None:
    """Write the model in models/NAME as ONNX, and print how far ONNX Runtime's outputs are from the graph's."""
    folder = WORK / "onnx"
    folder.mkdir(parents=True, exist_ok=True)
    recipe, out = folder / f"{name}.yaml", folder / name
    recipe.write_text(f"model: {ROOT / 'models' / name}\nemit: [onnx]\n")
    finished = run([sys.executable, "-m", "compiler.cli", str(recipe), "-o", str(out)])
    found = json.loads((out / "compress" / "report.json").read_text())["verification"]
    print(f"{name}: {found['error']:.2g} of scale, {found['tolerance']:.2g} allowed; {finished.seconds:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--models", nargs="+", default=["fp32", "int4, blocks of 32"], choices=list(PASSES))
    parser.add_argument("--genai", type=Path, nargs="*", default=[])
    parser.add_argument("--genai-runtime", action="store_true", help="also run them by onnxruntime-genai")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--reload", nargs="+", default=[], metavar="NAME", help="instead: models/NAME, written and run")
    options = parser.parse_args()
    for name in options.reload:
        reload(name)
    if options.reload:
        return
    for length in options.prompts:
        measure(options, length)


if __name__ == "__main__":
    main()
