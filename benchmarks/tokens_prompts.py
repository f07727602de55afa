"""A language model whose prompts lose tokens: how much faster it reads them, what its cache holds, what is lost.

``python benchmarks/tokens_prompts.py --prompts 2048 4096`` measures `drop-tokens` on SmolLM2-135M-Instruct, written as
ONNX models, with as many tokens behind the same layers for all methods, beside dropping random ones and all but the
last ones. Every prompt is read by all models in turns, on one thread.

`times`: how often as fast as the original a prompt is read, the median over prompts, by processor time; `predicted`:
the same by floating-point operations of products, attention's among them. `cache`: bytes after the prompt, of the
original's. `loss`: nats a token above the original's, of the ``--later`` tokens that follow the prompt in a text.
Needle: a fact in a novel, at several depths (as benchmarks/mla_context.py); log-probability of the answer and the share
of answers that greedy decoding gives.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from backends.onnx import emit, propose
from backends.onnx.check import PAST, PRESENT, empty_cache, session
from backends.onnx.write import save_models
from benchmarks.common import ROOT, SMOLLM2, show
from benchmarks.mla import RESULTS
from compiler.evaluate import load_model, load_tokenizer
from compiler.evaluate.metrics.needle import FACTS, haystack
from compiler.frontend import capture
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of
from compiler.ir.types import Dim, resolve_dim
from compiler.pipeline import Pipeline
from passes import DropTokens

SCORES = ("last", "received", "key-norm", "random", "recency")


@dataclass(frozen=True)
class Read:
    """Processor seconds for a prompt, bytes cached then, and logits [C, V] of what follows."""

    seconds: float
    cached: int
    logits: Tensor


class Reader:
    """An ONNX model with a cache, on one thread."""

    def __init__(self, path: Path) -> None:
        self.session = session(path, 1)
        self.names = [value.name for value in self.session.get_outputs()]

    def __call__(self, prompt: Tensor, later: Tensor) -> Read:
        """Logits of the last token of ``prompt`` [P], and of ``later`` [C] after it."""
        before = time.process_time()
        first, past = self._step(prompt, len(prompt), empty_cache(self.session, 1), 1)
        taken = time.process_time() - before
        rest, _ = self._step(later, len(prompt) + len(later), past, 0)
        return Read(taken, sum(value.nbytes for value in past.values()), torch.cat((first, rest)))

    def _step(self, ids: Tensor, total: int, past: Mapping[str, Any], scored: int) -> tuple[Tensor, dict[str, Any]]:
        feeds = {"input_ids": ids[None].numpy(), "attention_mask": np.ones((1, total), np.int64), **past}
        feeds["logits_to_keep"] = np.array([scored], np.int64)
        found = dict(zip(self.names, self.session.run(self.names, feeds), strict=True))
        kept = {name.replace(PRESENT, PAST, 1): value for name, value in found.items() if name.startswith(PRESENT)}
        return torch.from_numpy(found["logits"][0]), kept


def operations(graph: Graph, tokens: int) -> int:
    """Floating-point operations of the products for a prompt of ``tokens``, whose last token is scored."""
    batch, length = graph.inputs["input_ids"].shape
    sizes = {str(batch): 1, str(length): tokens}

    def size(dim: Dim) -> int:
        return resolve_dim(dim, sizes)

    linears = [node for node in graph.nodes_named("linear") if node.output not in graph.outputs.values()]
    found = sum(2 * size(node.output.shape[1]) * node.input(1).type.numel for node in linears)
    for node in graph.nodes_named("attention"):
        _, heads, queries, width = map(size, node.input(0).shape)
        found += 4 * heads * queries * size(node.input(1).shape[2]) * width
    return found


def written(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Reader], dict[str, Graph]]:
    """The original and every method, as models; those of the same tensors share them."""
    graph = capture(load_model(SMOLLM2))
    graphs = {"original": graph}
    for score in options.scores:
        graphs[score] = copy_of(graph)
        ends = {"prefix": options.prefix, "suffix": options.suffix}
        Pipeline([DropTokens(score=score, keep=tuple(options.keep), layers=options.layers, **ends)]).run(graphs[score])
    readers, folders = dict[str, Reader](), dict[tuple[str, ...], Path]()
    for name, own in graphs.items():
        tensors = tuple(propose(own).tensors)
        if tensors not in folders:
            folders[tensors] = folder / name
            folders[tensors].mkdir()
            emit(propose(own), graph.sources, folders[tensors])
        save_models(propose(own), folders[tensors], names={"model.onnx": f"{name}.onnx"})
        readers[name] = Reader(folders[tensors] / f"{name}.onnx")
    return readers, graphs


def windows(ids: Tensor, length: int, count: int) -> Iterator[Tensor]:
    """``count`` pieces of ``ids`` of ``length`` tokens, spread evenly."""
    starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
    yield from (ids[start : start + length] for start in starts)


def continuations(
    readers: Mapping[str, Reader], ids: Tensor, prompt: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Per method: times, cache, and loss above the original."""
    rows: list[dict[str, Read]] = []
    losses: list[dict[str, float]] = []
    for piece in windows(ids, prompt + options.later, options.windows):
        later = piece[prompt:]
        rows.append({name: reader(piece[:prompt], later[:-1]) for name, reader in readers.items()})
        losses.append(
            {name: torch.nn.functional.cross_entropy(read.logits, later).item() for name, read in rows[-1].items()}
        )
        print(time.strftime("%H:%M:%S"), prompt, losses[-1], file=sys.stderr, flush=True)
    return {
        name: {
            "times": median(row["original"].seconds / row[name].seconds for row in rows),
            "cache": mean(row[name].cached / row["original"].cached for row in rows),
            "loss": mean(own[name] - own["original"] for own in losses),
            "seconds": median(row[name].seconds for row in rows),
        }
        for name in readers
    }


def needles(
    readers: Mapping[str, Reader], tokenizer: Any, filler: Tensor, length: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Per depth and method: log-probability of the answers, and the share that greedy decoding gives."""
    found: list[dict[str, Any]] = []
    for depth in options.depths:
        scored: dict[str, list[tuple[float, bool]]] = {name: [] for name in readers}
        for fact in FACTS[: options.facts]:
            prompt = haystack(tokenizer, filler, fact, length, depth)
            answer = torch.tensor(tokenizer(fact.answer, add_special_tokens=False).input_ids)
            for name, reader in readers.items():
                logits = reader(prompt, answer[:-1]).logits
                chosen = logits.log_softmax(-1).gather(1, answer[:, None]).sum().item()
                scored[name].append((chosen, bool((logits.argmax(-1) == answer).all())))
        row = {
            name: {"log": mean(log for log, _ in own), "greedy": mean(hit for _, hit in own)}
            for name, own in scored.items()
        }
        found.append({"depth": depth, **row})
        print(time.strftime("%H:%M:%S"), found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(SMOLLM2)
    texts = {path.stem: path.read_text(encoding="utf-8")[options.start :] for path in options.texts}
    ids = {name: torch.tensor(tokenizer(text[:400_000], verbose=False).input_ids) for name, text in texts.items()}
    RESULTS.mkdir(exist_ok=True)
    path, found = RESULTS / f"tokens-prompts-{options.name}.json", dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        readers, graphs = written(options, Path(folder))
        for prompt in options.prompts:
            predicted = {
                name: operations(graphs["original"], prompt) / operations(g, prompt) for name, g in graphs.items()
            }
            for name, own in ids.items():
                rows = continuations(readers, own, prompt, options) if options.windows else {}
                found[f"{name} {prompt}"] = rows
                report(f"{name}, prompts of {prompt}", rows, predicted)
            if options.facts:
                found[f"needle {prompt}"] = needles(readers, tokenizer, next(iter(ids.values())), prompt, options)
                report_needles(f"Needle, prompts of {prompt}", found[f"needle {prompt}"], list(readers))
            path.write_text(json.dumps(found, indent=1))
    print(f"\n{path.relative_to(ROOT)}")


def report(title: str, rows: Mapping[str, Mapping[str, float]], predicted: Mapping[str, float]) -> None:
    cells = [
        [name, f"{row['times']:.2f}", f"{predicted[name]:.2f}", f"{row['cache']:.3f}", f"{row['loss']:+.3f}"]
        for name, row in rows.items()
    ]
    show(title, [["method", "times", "predicted", "cache", "loss"], *cells])


def report_needles(title: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    cells = [
        [f"{row['depth']:.0%}", *(f"{row[name]['log']:.2f} / {row[name]['greedy']:.0%}" for name in names)]
        for row in rows
    ]
    show(title, [["depth", *names], *cells])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts = [ROOT / "data" / f"{name}.txt" for name in ("brown_a", "northanger")]
    parser.add_argument("--texts", type=Path, nargs="+", default=texts)
    parser.add_argument("--start", type=int, default=0, help="the first character of a text that is read")
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048, 4096], metavar="TOKENS")
    parser.add_argument("--later", type=int, default=64, help="tokens that follow a prompt")
    parser.add_argument("--windows", type=int, default=4, help="prompts of each text")
    parser.add_argument("--scores", nargs="+", default=SCORES)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--layers", default="9,18")
    parser.add_argument("--prefix", type=int, default=4, help="first tokens that always remain")
    parser.add_argument("--suffix", type=int, default=32, help="last tokens that always remain")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--facts", type=int, default=len(FACTS))
    parser.add_argument("--name", default="latest", help="of the file in benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
