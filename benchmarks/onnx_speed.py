"""SmolLM2-135M in ONNX Runtime beside the models of onnxruntime-genai's builder, transformers and llama.cpp.

    python benchmarks/onnx_speed.py [--threads 1] [--prompts 128 1024 4096] [--genai DIR ...] [--llama FILE ...]

Each DIR holds a model that `python -m onnxruntime_genai.models.builder -i HF -o DIR -p int4 -e cpu` wrote, from the
checkpoint HF that this script writes to out/benchmarks/onnx/hf. It is run by the loop that runs ours, and with
`--genai-runtime` by onnxruntime-genai too, so that models and runtimes are compared apart. FILEs are GGUF files for
llama.cpp, by the package xllamacpp.

Every engine reads the prompt and goes on for some tokens, one engine after another, in rounds of changing order; shown
are medians over rounds. Each round loads everything anew, since where memory happens to lie moves a token by a
tenth. On a machine with other work look at processor time; with one thread it is what a token takes. `--filled` reads
no prompts: caches are filled with numbers, and only tokens after them are timed, of our models and the builder's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backends.onnx.runner import Runner
from benchmarks.common import ROOT, SMOLLM2, WORK, run
from compiler.console import table

INT4 = "where: linear, bits: 4, group: 32, tied: copy"
ZEROS = "where: linear, bits: 4, group: 32, symmetric: false, tied: share"
REFINED = "where: linear, bits: 4, tied: share, method: refined"
WIDE = "where: linear, bits: 4, group: 64, symmetric: false, tied: share"
PASSES: dict[str, str] = {
    "fp32": "[]",
    "int4, blocks of 32": f"[quantize: {{{INT4}}}]",
    "int4, blocks of 64": "[quantize: {where: linear, bits: 4, group: 64, tied: copy}]",
    "int4, blocks of 32, cache int8": f"[quantize: {{{INT4}, cache: int8}}]",
    "int4, prompts int8": f"[quantize: {{{INT4}}}]",
    "int4, prompts and cache int8": f"[quantize: {{{INT4}, cache: int8}}]",
    "int4 of 64 with zero points, prompts int8": f"[quantize: {{{WIDE}}}]",
    "int4 refined": f"[quantize: {{{REFINED}, group: 32}}]",
    "int4 of 64 refined": f"[quantize: {{{REFINED}, group: 64}}]",
    "int4 with zero points": f"[quantize: {{{ZEROS}}}]",
    "int4 with zero points, prompts int8": f"[quantize: {{{ZEROS}}}]",
    "int4 with zero points, prompts and cache int8": f"[quantize: {{{ZEROS}, cache: int8}}]",
    "latent half, int4 of 32": f"[gqa-to-mla: {{rank: 128, rope-dim: 64}}, quantize: {{{INT4}}}]",
}
TEXT = ROOT / "data" / "brown_b.txt"
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
        onnx = "[onnx: {prompts: int8}]" if "prompts" in name else "[onnx]"
        emit = "[safetensors]" if name == BUILT_FROM else onnx
        out = folder / name.replace(" ", "-").replace(",", "")
        if not out.is_dir():
            recipe = out.with_suffix(".yaml")
            text = f"calibration: {{data: {TEXT}, samples: 16, length: 512}}\n"
            recipe.write_text(f"model: {SMOLLM2}\n{text}passes: {PASSES.get(name, '[]')}\nemit: {emit}\n")
            run([sys.executable, "-m", "compiler.cli", str(recipe), "-o", str(out)])
        if name != BUILT_FROM:
            found[name] = out / "onnx" / "model.onnx"
    return found


def by_genai(directory: Path, ids: Sequence[int], count: int, threads: int) -> Iterator[int]:
    """Ones for tokens of a model by onnxruntime-genai's own loop."""
    import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]

    config = og.Config(str(directory))
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
    params = og.GeneratorParams(model := og.Model(config))
    params.set_search_options(max_length=len(ids) + count + 1, do_sample=False)
    generator = og.Generator(model, params)

    def tokens() -> Iterator[int]:
        generator.append_tokens(np.array([ids], dtype=np.int32))
        for _ in range(count):
            generator.generate_next_token()
            yield 1

    return tokens()


def by_transformers(ids: Sequence[int], count: int, threads: int, attention: str) -> Iterator[int]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    source = WORK / "onnx" / BUILT_FROM
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation=attention).eval()

    def tokens() -> Iterator[int]:
        given, cache = torch.tensor([list(ids)]), None
        for _ in range(count):
            with torch.inference_mode():
                result = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, given = result.past_key_values, result.logits[:, -1:].argmax(-1)
            yield 1

    return tokens()


def by_llama(file: Path, ids: Sequence[int], count: int, threads: int) -> Iterator[int]:
    """llama.cpp: the prompt and a token, then all others at once; it keeps what it has read."""
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = len(ids) + count + 8, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server: Any = xllamacpp.Server(params)
    wanted = {"prompt": list(ids), "temperature": 0, "cache_prompt": True, "ignore_eos": True}

    def tokens() -> Iterator[int]:
        for several in (1, count - 1):
            server.handle_completions({**wanted, "n_predict": several})
            yield several

    return tokens()


def taken(tokens: Iterator[int]) -> tuple[Taken, Taken]:
    """Seconds on the processors and on the clock that the prompt takes, and a token after it; ``tokens`` are how many
    an engine gave at once."""
    found: list[Taken] = []
    while True:
        cpu, wall = time.process_time(), time.perf_counter()
        given = next(tokens, None)
        if given is None:
            break
        found.append(((time.process_time() - cpu) / given, (time.perf_counter() - wall) / given))
    cpu, wall = (statistics.median(each[clock] for each in found[1:]) for clock in (0, 1))
    return found[0], (cpu, wall)


def engines(options: argparse.Namespace, ids: Sequence[int], count: int) -> dict[str, Callable[[], Iterator[int]]]:
    """Everything that is compared, by what it is called; each call loads it anew, before the first token."""
    threads = options.threads
    made: dict[str, Callable[[], Iterator[int]]] = {}
    for name, path in written(options.models).items():
        made[name] = lambda path=path: (1 for _ in Runner(path, threads=threads).greedy(ids, count))
    for folder in options.genai:
        file = folder / "model.onnx"
        made[f"{folder.name}: genai's model, our loop"] = lambda file=file: (
            1 for _ in Built(file, threads=threads).greedy(ids, count)
        )
        if options.genai_runtime:
            made[f"{folder.name}: genai's own loop"] = lambda folder=folder: by_genai(folder, ids, count, threads)
    for kind in options.transformers:
        made[f"transformers, fp32, {kind}"] = lambda kind=kind: by_transformers(ids, count, threads, kind)
    for file in options.llama:
        made[f"llama.cpp, {file.stem}"] = lambda file=file: by_llama(file, ids, count, threads)
    return made


def measure(options: argparse.Namespace, length: int) -> None:
    shuffled = random.Random(0)
    ids = [shuffled.randrange(10, 40000) for _ in range(length)]
    chosen, found = engines(options, ids, options.tokens + 1), dict[str, list[tuple[Taken, Taken]]]()
    for _ in range(options.rounds):
        for name in shuffled.sample(list(chosen), len(chosen)):
            found.setdefault(name, []).append(taken(chosen[name]()))
    rows = [("", "prompt, CPU ms", "a token, CPU ms", "least", "prompt, ms", "a token, ms")]
    for name in chosen:
        prompt, token = ([each[part] for each in found[name]] for part in (0, 1))
        middle = [statistics.median(each[clock] for each in part) * 1e3 for part in (prompt, token) for clock in (0, 1)]
        least = min(each[0] for each in token) * 1e3
        shown = (f"{middle[0]:.0f}", f"{middle[2]:.2f}", f"{least:.2f}", f"{middle[1]:.0f}", f"{middle[3]:.2f}")
        rows.append((name, *shown))
    print(
        f"\n{options.threads} thread(s), {length} tokens of prompt, {options.tokens} new ones, {options.rounds} rounds"
    )
    print(table(rows), flush=True)


def filled(model: Runner, length: int, count: int) -> float:
    """Milliseconds of processor time, the median over ``count`` tokens, after ``length`` ones that were made up."""
    made, past = np.random.default_rng(0), {}
    for name, value in model._empty(1).items():
        empty = value.numpy()
        numbers = made.random((*empty.shape[:2], length, empty.shape[3]), np.float32) - 0.5
        past[name] = model._value((numbers * 100).astype(np.int8) if empty.dtype == np.int8 else numbers)
    steps, found = model._steps(past, count), list[float]()
    for number in range(count):
        started = time.process_time()
        steps.run(number, np.ones((1, length + number + 1), np.int64))
        found.append((time.process_time() - started) * 1e3)
    return statistics.median(found)


def measure_filled(options: argparse.Namespace) -> None:
    """All lengths of a model at each load, since loading takes longer than tokens do."""
    paths = {name: (Runner, path) for name, path in written(options.models).items()}
    paths |= {f"{folder.name}: genai's model": (Built, folder / "model.onnx") for folder in options.genai}
    shuffled, found = random.Random(0), {name: {length: [] for length in options.prompts} for name in paths}
    for _ in range(options.rounds):
        for name in shuffled.sample(list(paths), len(paths)):
            kind, path = paths[name]
            model = kind(path, threads=options.threads)
            for length in options.prompts:
                found[name][length].append(filled(model, length, options.tokens))
    rows = [("a token, CPU ms", *(f"after {length}, least" for length in options.prompts))]
    for name, taken_after in found.items():
        shown = (f"{statistics.median(each):.2f}, {min(each):.2f}" for each in taken_after.values())
        rows.append((name, *shown))
    print(f"\n{options.threads} thread(s), {options.tokens} tokens, {options.rounds} rounds")
    print(table(rows), flush=True)


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
    parser.add_argument("--transformers", nargs="*", default=[], choices=["eager", "sdpa"])
    parser.add_argument("--llama", type=Path, nargs="*", default=[], metavar="FILE")
    parser.add_argument("--filled", action="store_true", help="time tokens after caches of made-up numbers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reload", nargs="+", default=[], metavar="NAME", help="instead: models/NAME, written and run")
    options = parser.parse_args()
    for name in options.reload:
        reload(name)
    if options.reload:
        return
    if options.filled:
        measure_filled(options)
        return
    for length in options.prompts:
        measure(options, length)


if __name__ == "__main__":
    main()
