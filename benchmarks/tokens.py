"""Encoders that go on with fewer tokens: how much faster ONNX Runtime is, and what becomes of what they are used for.

``python benchmarks/tokens.py dinov2 minilm`` measures `drop-tokens` on DINOv2-small and all-MiniLM-L6-v2 with as many
tokens behind every layer for all methods, beside dropping random ones and, of pictures, published ToMe, whose plain
implementation (peers_tokens) runs in torch and is not timed.

DINOv2: Fashion-MNIST, enlarged. `cosine`: of the class token with the original's, the mean over pictures; `accuracy`,
`agrees`: of the labels of its 10 nearest neighbours among others (as benchmarks/encoders.py).
MiniLM: sentences of Brown, or passages of several (``--words``). `spearman`: rank correlation with the original's
cosines of means over tokens, of all pairs. Means are over all tokens, dropped ones as they were then.

`times`: how often as fast as the original ONNX Runtime is on a batch, both in turns, by processor time of one thread,
medians; `predicted`: the same by FLOPs of the products with weights. ``python benchmarks/fetch.py minilm dinov2 brown
fashion`` gets models and data.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.nn import functional as F

from backends.onnx import emit, propose
from benchmarks import encoders
from benchmarks.common import ROOT, show
from benchmarks.encoders import fashion, neighbours, similarities
from benchmarks.fetch import DATA, MODELS
from benchmarks.mla import RESULTS
from benchmarks.peers_tokens import tome
from compiler.evaluate.loading import load_model, load_tokenizer
from compiler.frontend import capture
from compiler.ir.facts import flops_per_token
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of
from compiler.pipeline import Pipeline
from passes import DropTokens

BATCH, TURNS = 8, 15
Feeds = Mapping[str, np.ndarray]
Scores = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A graph, batches of its inputs, and what scores outputs against the original's."""

    graph: Graph
    batches: list[Feeds]
    score: Callable[[Sequence[Tensor], Sequence[Tensor]], Scores]
    methods: Mapping[str, DropTokens]
    peer: Callable[[Feeds], Tensor] | None = None


class Session:
    """An ONNX model of a graph, on one thread."""

    def __init__(self, graph: Graph) -> None:
        self.folder = tempfile.TemporaryDirectory()
        emit(propose(graph), graph.sources, Path(self.folder.name))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(Path(self.folder.name) / "model.onnx", options)

    def __call__(self, feeds: Feeds) -> Tensor:
        return torch.from_numpy(self.session.run(["last_hidden_state"], dict(feeds))[0])


def times(sessions: Sequence[Session], feeds: Feeds) -> list[float]:
    """Median processor seconds of each, in turns."""
    taken: list[list[float]] = [[] for _ in sessions]
    for _ in range(TURNS):
        for own, session in zip(taken, sessions, strict=True):
            before = time.process_time()
            session(feeds)
            own.append(time.process_time() - before)
    return [median(own[1:]) for own in taken]


def dinov2(options: argparse.Namespace) -> Task:
    encoders.IMAGE = options.image
    model = encoders.at_size(load_model(MODELS / "dinov2"))
    train, labels = fashion("train")
    test, truth = fashion("t10k")
    known, asked = 4 * options.score, 2 * options.score
    pictures = [*train[:known], *test[:asked]]
    batches = [
        {"pixel_values": torch.cat([encoders.picture(each) for each in pictures[i : i + BATCH]]).numpy()}
        for i in range(0, len(pictures), BATCH)
    ]
    graph = capture(model)
    tokens = int(graph.outputs["last_hidden_state"].shape[1])
    merged = options.merged or tokens // 13
    common: dict[str, Any] = {"keep": left(tokens, merged, 12), "prefix": 1}
    methods = {
        "merge: bipartite": DropTokens(merge="bipartite", **common),
        "merge: bipartite, not proportional": DropTokens(merge="bipartite", proportional=False, **common),
        "merge: average": DropTokens(merge="average", **common),
        "score: class": DropTokens(score="class", **common),
        "merge: extra, score: class": DropTokens(merge="extra", score="class", **common),
        "score: key-norm": DropTokens(score="key-norm", **common),
        "score: random": DropTokens(score="random", **common),
    }

    def score(original: Sequence[Tensor], found: Sequence[Tensor]) -> Scores:
        rows = [[row[None] for batch in each for row in batch] for each in (original, found)]
        cosine = F.cosine_similarity(torch.cat(rows[0])[:, 0], torch.cat(rows[1])[:, 0]).mean().item()
        return {"cosine": cosine, **neighbours(*rows, labels=labels[:known], truth=truth[:asked])}

    published = tome(model, merged)

    def peer(feeds: Feeds) -> Tensor:
        return published(torch.from_numpy(feeds["pixel_values"]))[:, None]

    return Task(graph, batches, score, methods, peer)


def left(tokens: int, merged: int, layers: int) -> tuple[int, ...]:
    """The tokens behind each layer that merges so many, or as many as have another to go into."""
    found = [tokens]
    for _ in range(layers):
        found.append(found[-1] - min(merged, (found[-1] - 1) // 2))
    return tuple(found[1:])


def minilm(options: argparse.Namespace) -> Task:
    tokenizer = load_tokenizer(MODELS / "minilm")
    lines = [line for line in (DATA / "brown_a.txt").read_text(encoding="utf-8").splitlines() if len(line) >= 40]
    words = " ".join(lines).split()
    passages = [" ".join(words[i : i + options.words]) for i in range(0, len(words) - options.words, options.words)]
    chosen = sorted(passages[:: max(1, len(passages) // (2 * options.score))][: 2 * options.score], key=len)
    batches = [_padded(tokenizer(chosen[i : i + BATCH])["input_ids"]) for i in range(0, len(chosen), BATCH)]
    masks = [torch.from_numpy(batch["attention_mask"])[..., None] for batch in batches]

    def score(original: Sequence[Tensor], found: Sequence[Tensor]) -> Scores:
        def means(states: Sequence[Tensor]) -> list[Tensor]:
            pooled = [(x * mask).sum(1) / mask.sum(1) for x, mask in zip(states, masks, strict=True)]
            return [row[None, None] for each in pooled for row in each]

        return similarities(means(original), means(found))

    keep = tuple(options.keep)
    layers = options.layers
    common: dict[str, Any] = {"keep": keep, "layers": layers}
    scores: tuple[Any, ...] = ("received", "class", "key-norm", "recency", "random")
    methods = {"merge: bipartite": DropTokens(merge="bipartite", **common)}
    methods |= {f"score: {name}": DropTokens(score=name, **common) for name in scores}
    return Task(capture(load_model(MODELS / "minilm")), batches, score, methods)


def _padded(ids: list[list[int]]) -> Feeds:
    length = max(map(len, ids))
    padded = np.array([row + [0] * (length - len(row)) for row in ids], np.int64)
    mask = np.array([[place < len(row) for place in range(length)] for row in ids], np.int64)
    return {"input_ids": padded, "attention_mask": mask}


TASKS = {"dinov2": dinov2, "minilm": minilm}


def rows(task: Task) -> Iterator[dict[str, Any]]:
    whole = Session(task.graph)
    original = [whole(feeds) for feeds in task.batches]
    longest = task.batches[-1 if task.peer is None else 0]
    yield {"method": "original", "times": 1.0, "predicted": 1.0, **task.score(original, original)}
    if task.peer is not None:
        found = [task.peer(feeds) for feeds in task.batches]
        yield {"method": "published ToMe", "times": "", "predicted": "", **task.score(original, found)}
    for name, method in task.methods.items():
        graph = copy_of(task.graph)
        graph.sources = dict(task.graph.sources)
        Pipeline([method]).run(graph)
        session = Session(graph)
        found = [session(feeds) for feeds in task.batches]
        slow, fast = times([whole, session], longest)
        predicted = flops_per_token(task.graph) / flops_per_token(graph)
        yield {"method": name, "times": slow / fast, "predicted": predicted, **task.score(original, found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=[*TASKS], metavar="MODEL", help=", ".join(TASKS))
    parser.add_argument("--image", type=int, default=112, help="pixels of an enlarged picture's side")
    parser.add_argument("--merged", type=int, help="tokens fewer behind every layer of DINOv2")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.6, 0.4, 0.3], help="of MiniLM, for each layer")
    parser.add_argument("--layers", default="0-2", help="of MiniLM")
    parser.add_argument("--words", type=int, default=60, help="in a passage")
    parser.add_argument("--score", type=int, default=100, help="half as many as pictures asked about, or passages")
    parser.add_argument("--name", default="latest", help="of the file in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"tokens-{options.name}.json"
    found: dict[str, list[dict[str, Any]]] = {}
    for name in options.tasks:
        measured = found[name] = []
        for row in rows(TASKS[name](options)):
            measured.append(row)
            path.write_text(json.dumps(found, indent=1))
            print(time.strftime("%H:%M:%S"), name, row, file=sys.stderr, flush=True)
        show(name, [[*measured[0]], *([shown(value) for value in row.values()] for row in measured)])
    print(f"\n{path.relative_to(ROOT)}")


def shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
