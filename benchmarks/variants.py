"""Compressed SmolLM2-135M in generated modules: the tokens that torch and transformers alone write, and our graph's.

    python benchmarks/variants.py                        all variants, in a process that cannot import this project
    python benchmarks/variants.py --python VENV/bin/python   the same, by the interpreter of another environment

A recipe for each variant is run, its checkpoint is loaded and continues prompts greedily by ``generate``; the graph
continues them by a whole forward pass for each token. Also how many lines the written code has, and its bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from backends.safetensors import emit
from benchmarks.common import ROOT, SMOLLM2, WORK, show, weight_bytes
from compiler import Recipe
from compiler.calibration.sweep import token_batches
from compiler.evaluate.loading import load_tokenizer
from compiler.evaluate.texts import TextData
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.pipeline import Pipeline
from compiler.plan import open_recipe_model
from compiler.target import checkpoint_for
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import load
from compiler.weights.source import MemorySource

PROMPTS = ("The capital of France is", "In the beginning of the year, she")
CALIBRATION = {"data": str(ROOT / "data" / "emma.txt"), "samples": 8, "length": 256}
INT4 = {"quantize": {"where": "linear", "skip": ["lm_head"], "bits": 4, "group": 64}}
LOW_RANK = {"low-rank": {"where": "mlp", "keep": "90%", "form": "pair", "metric": "input", "ranks": "uniform"}}
PRUNE = {"prune": {"keep": "90%", "score": "magnitude"}}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "latent attention": [{"gqa-to-mla": {}}],
    "low rank": [LOW_RANK],
    "int4": [INT4],
    "latent attention, int4": [{"gqa-to-mla": {}}, INT4],
    "pruned, int4": [PRUNE, INT4],
    "latent attention, low rank, int4": [{"gqa-to-mla": {}}, LOW_RANK, {"quantize": {**INT4["quantize"], "group": 0}}],
}
CLEAN = """
import json, sys
directory, count, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
assert not any(name.split(".")[0] in ("compiler", "passes", "backends") for name in sys.modules)
options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
print(json.dumps([model.generate(torch.tensor([ids]), **options)[0].tolist() for ids in prompts]))
"""


def main() -> None:
    """Prints a table of the variants."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("names", nargs="*", default=list(VARIANTS))
    arguments.add_argument("--tokens", type=int, default=24)
    arguments.add_argument("--python", default=sys.executable)
    chosen = arguments.parse_args()
    rows: list[tuple[str, ...]] = [("variant", "lines of code", "weights", "prompts with the same tokens")]
    for name in chosen.names:
        rows.append(measured(name, chosen.tokens, chosen.python))
        print(*rows[-1], sep=" | ", flush=True)
    show(f"{chosen.tokens} greedy tokens", rows)


def measured(name: str, count: int, python: str) -> tuple[str, ...]:
    """A row of the table."""
    directory = WORK / "variants" / name.replace(", ", "-").replace(" ", "-")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    graph = written(VARIANTS[name], directory)
    tokenizer: Any = load_tokenizer(SMOLLM2)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    same = sum(
        found == continued(graph, ids, count)
        for found, ids in zip(generated(directory, prompts, count, python), prompts, strict=True)
    )
    lines = len(next(directory.glob("modeling_*.py")).read_text().splitlines())
    return name, str(lines), f"{weight_bytes(directory) / 1e6:.1f} MB", f"{same} of {len(prompts)}"


def written(passes: list[dict[str, Any]], directory: Path) -> Graph:
    """The graph after ``passes`` by a recipe, whose checkpoint is written into ``directory``."""
    text = {"model": str(SMOLLM2), "passes": passes, "emit": [{"safetensors": {"class": "generated"}}]}
    path = directory.with_suffix(".yaml")
    path.write_text(json.dumps({**text, "calibration": CALIBRATION}))
    recipe = Recipe.load(path)
    graph = open_recipe_model(recipe)
    with tempfile.TemporaryDirectory() as work:
        Pipeline(recipe.passes).run(graph, workdir=Path(work), calibration=lambda graph: samples(graph, recipe))
        emission = checkpoint_for(graph, recipe)
        assert emission is not None  # the recipe asks for it
        emit(emission, graph.sources, directory)
        return held(graph)


def held(graph: Graph) -> Graph:
    """``graph`` with its weights in memory, so that they are computed once."""
    values = dict(zip(graph.params, evaluate([p.expr for p in graph.params.values()], graph.sources), strict=True))
    graph.sources = {"values": MemorySource(values)}
    for name, param in graph.params.items():
        param.expr = load("values", name, param.expr.type)
    return graph


def samples(graph: Graph, recipe: Recipe) -> Any:
    """The recipe's calibration data."""
    wanted = recipe.calibration
    assert wanted is not None  # every recipe here has some
    data = TextData(wanted.data, wanted.samples, wanted.length, wanted.seed)
    return token_batches(graph, data.windows(load_tokenizer(SMOLLM2)))


def continued(graph: Graph, ids: list[int], count: int) -> list[int]:
    """``ids`` and greedy tokens after them, by whole forward passes of the graph."""
    tokens = torch.tensor([ids])
    for _ in range(count):
        tokens = torch.cat((tokens, run(graph, {"input_ids": tokens})["logits"][:, -1:].argmax(-1)), 1)
    return tokens[0].tolist()


def generated(directory: Path, prompts: list[list[int]], count: int, python: str) -> list[list[int]]:
    """What a process without this project makes of the checkpoint."""
    packages = sysconfig.get_paths()["purelib"]
    alone = f"import sys; sys.path[:] = [p for p in sys.path if 'lib/python' in p] + [{packages!r}]\n"
    code = alone + CLEAN if python == sys.executable else CLEAN
    flags = ["-I", "-S"] if python == sys.executable else ["-I"]
    command = [python, *flags, "-c", code, str(directory), str(count), json.dumps(prompts)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
