"""Encoders that go on with fewer tokens: how much faster ONNX Runtime is, and what becomes of what they are used for.

``python benchmarks/tokens.py dinov2 minilm whisper`` measures `drop-tokens` on DINOv2-small, all-MiniLM-L6-v2 and the
encoder of Whisper tiny.en with as many tokens behind every layer for all methods, beside dropping random ones and, of
pictures, published ToMe, whose plain implementation (peers_tokens) runs in torch and is not timed.

DINOv2: Fashion-MNIST, enlarged. `cosine`: of the class token with the original's, the mean over pictures; `accuracy`,
`agrees`: of the labels of its 10 nearest neighbours among others (as benchmarks/encoders.py).
MiniLM: passages of ``--words`` words of ``--text``. `spearman`: rank correlation with the original's cosines of means
over tokens, of all pairs. Means are over all tokens, dropped ones as they were then. ``--heal`` so many tokens of Brown
B to F: the first method once more, healed on them. ``--learn``: gates trained on so many.
Whisper: recordings of people, half a minute each; its own decoder writes what the encoder's states say. `wer`: words
that differ from what it writes with the original's, by the words of that; `same`: share of recordings without any.

`times`: how often as fast as the original ONNX Runtime is on a batch, both in turns, by processor time of one thread,
medians; `predicted`: the same by FLOPs of the products with weights; `by parts`: by what each operation takes alone, of
the first ``--parts`` methods. ``--runtime torch``: generated modules instead, which MiniLM has none of.
``python benchmarks/fetch.py minilm dinov2 whisper brown fashion speech`` gets models and data.
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
from transformers.modeling_outputs import BaseModelOutput

from backends.onnx import emit, propose
from backends.safetensors import emit as emit_module
from benchmarks import encoders
from benchmarks.common import ROOT, show
from benchmarks.encoders import LINEARS, fashion, neighbours, similarities
from benchmarks.fetch import DATA, MODELS
from benchmarks.mla import RESULTS
from benchmarks.peers_tokens import tome
from compiler.evaluate.loading import load_extractor, load_model, load_tokenizer
from compiler.evaluate.speech import speech_features
from compiler.frontend import capture
from compiler.ir.facts import flops_per_token
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of
from compiler.latency import Latency, Table, Workload
from compiler.latency.measure import measuring
from compiler.pipeline import Pass, Pipeline
from compiler.target import emission_of
from passes import DropTokens, Heal

BATCH, TURNS = 8, 15
WORDS = 128  # pictures that a vocabulary is found in, none of those known or asked about
KEEP = {"minilm": (0.85, 0.7, 0.6, 0.5), "whisper": (0.85, 0.7, 0.55, 0.4)}
SCORES: tuple[Any, ...] = ("received", "class", "key-norm", "recency", "random")
Feeds = Mapping[str, np.ndarray]
Scores = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A graph, batches of its inputs, and what scores outputs against the original's."""

    graph: Graph
    batches: list[Feeds]
    score: Callable[[Sequence[Tensor], Sequence[Tensor]], Scores]
    methods: Mapping[str, Sequence[Pass]]
    peer: Callable[[Feeds], Tensor] | None = None
    calibration: Sequence[Mapping[str, Tensor]] = ()


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


class Module:
    """The module generated of a graph, in torch, on one thread."""

    def __init__(self, graph: Graph) -> None:
        self.folder = tempfile.TemporaryDirectory()
        emit_module(emission_of(graph, "generated"), graph.sources, Path(self.folder.name))
        self.model = load_model(self.folder.name, trust_remote_code=True)

    def __call__(self, feeds: Feeds) -> Tensor:
        with torch.inference_mode():
            return self.model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).last_hidden_state


RUNTIMES = {"onnxruntime": Session, "torch": Module}


def times(sessions: Sequence[Session | Module], feeds: Feeds) -> list[float]:
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
    even = round(sum(common["keep"]) / 12)  # about as much arithmetic
    methods = {
        "merge: bipartite": DropTokens(merge="bipartite", **common),
        "merge: bipartite, compare: stream": DropTokens(merge="bipartite", compare="stream", **common),
        "merge: bipartite, not proportional": DropTokens(merge="bipartite", proportional=False, **common),
        "merge: average": DropTokens(merge="average", **common),
        "merge: words": DropTokens(merge="words", compare="stream", site="entry", layers="0", keep=even, prefix=1),
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

    words = [{"pixel_values": encoders.picture(each)} for each in train[known : known + WORDS]]
    return Task(graph, batches, score, alone(methods), peer, words)


def alone(methods: Mapping[str, DropTokens]) -> dict[str, Sequence[Pass]]:
    return {name: [method] for name, method in methods.items()}


def left(tokens: int, merged: int, layers: int) -> tuple[int, ...]:
    """The tokens behind each layer that merges so many, or as many as have another to go into."""
    found = [tokens]
    for _ in range(layers):
        found.append(found[-1] - min(merged, (found[-1] - 1) // 2))
    return tuple(found[1:])


def minilm(options: argparse.Namespace) -> Task:
    tokenizer = load_tokenizer(MODELS / "minilm")
    chosen = sorted(passages(options.text, options.words, 2 * options.score), key=len)
    batches = [_padded(tokenizer(chosen[i : i + BATCH])["input_ids"]) for i in range(0, len(chosen), BATCH)]
    masks = [torch.from_numpy(batch["attention_mask"])[..., None] for batch in batches]

    def score(original: Sequence[Tensor], found: Sequence[Tensor]) -> Scores:
        def means(states: Sequence[Tensor]) -> list[Tensor]:
            pooled = [(x * mask).sum(1) / mask.sum(1) for x, mask in zip(states, masks, strict=True)]
            return [row[None, None] for each in pooled for row in each]

        return similarities(means(original), means(found))

    common: dict[str, Any] = {"keep": tuple(options.keep or KEEP["minilm"]), "layers": options.layers or "0-3"}
    by_stream, by_keys = (DropTokens(merge="bipartite", compare=by, **common) for by in ("stream", "keys"))
    methods = alone({"merge: bipartite, compare: stream": by_stream, "merge: bipartite": by_keys})
    methods |= alone({f"score: {name}": DropTokens(score=name, **common) for name in SCORES})
    windows: list[Mapping[str, Tensor]] = []
    if options.heal:
        budget: dict[str, Any] = {"layer_tokens": 0, "tokens": options.heal, "adapters": options.adapters}
        heal = Heal(where=LINEARS, of="means", **budget)
        methods = {"merge: bipartite, compare: stream, healed": [by_stream, heal]} | methods
    if options.learn:
        methods |= alone({"score: learned": DropTokens(score="learned", of="means", learn=options.learn, **common)})
    if options.heal or options.learn:
        windows = calibration(tokenizer, options)
    return Task(capture(load_model(MODELS / "minilm")), batches, score, methods, calibration=windows)


def passages(text: str, words: int, count: int) -> list[str]:
    """``count`` passages of so many words of a text, evenly spaced."""
    lines = [line for line in (DATA / f"{text}.txt").read_text(encoding="utf-8").splitlines() if len(line) >= 40]
    every = " ".join(lines).split()
    found = [" ".join(every[i : i + words]) for i in range(0, len(every) - words, words)]
    return found[:: max(1, len(found) // count)][:count]


def calibration(tokenizer: Any, options: argparse.Namespace) -> list[Mapping[str, Tensor]]:
    """Passages of Brown B to F of as many tokens each, those of which most of the scored ones have about as many."""
    length = round(1.25 * options.words)
    count = 1 + max(options.heal, options.learn) // length // 5
    rows = [
        tokenizer(passage, truncation=True, max_length=length)["input_ids"]
        for genre in "bcdef"
        for passage in passages(f"brown_{genre}", options.words + options.words // 5, count)
    ]
    return [{"input_ids": torch.tensor([row])} for row in rows if len(row) == length]


def whisper(options: argparse.Namespace) -> Task:
    model = load_model(MODELS / "whisper")
    tokenizer, extractor = load_tokenizer(MODELS / "whisper"), load_extractor(MODELS / "whisper", model.config)
    clips = speech_features(extractor, DATA / "speech" / "people", options.clips, 0)

    def written(states: Tensor) -> str:
        with torch.inference_mode():
            ids = model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=states), max_new_tokens=96)
        return tokenizer.decode(ids[0], skip_special_tokens=True)

    def score(original: Sequence[Tensor], found: Sequence[Tensor]) -> Scores:
        pairs = [(written(x).lower().split(), written(y).lower().split()) for x, y in zip(original, found, strict=True)]
        wrong = [differing(*pair) for pair in pairs]
        cosine = torch.stack([F.cosine_similarity(x, y, dim=-1).mean() for x, y in zip(original, found, strict=True)])
        total = sum(len(words) for words, _ in pairs)
        return {"cosine": cosine.mean().item(), "wer": sum(wrong) / total, "same": wrong.count(0) / len(wrong)}

    common: dict[str, Any] = {"keep": tuple(options.keep or KEEP["whisper"]), "layers": options.layers}
    methods = {
        "merge: bipartite": DropTokens(merge="bipartite", **common),
        "merge: bipartite, compare: stream": DropTokens(merge="bipartite", compare="stream", **common),
        "merge: average": DropTokens(merge="average", **common),
        "score: received": DropTokens(score="received", every=8, **common),
        "score: random": DropTokens(score="random", **common),
    }
    batches = [{"input_features": clip.numpy()} for clip in clips]
    return Task(capture(model.get_encoder()), batches, score, alone(methods))


def differing(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words have to be written, left out or put in to make one text of the other."""
    row = list(range(len(other) + 1))
    for place, word in enumerate(one, 1):
        last, row[0] = row[0], place
        for i, own in enumerate(other, 1):
            last, row[i] = row[i], min(row[i] + 1, row[i - 1] + 1, last + (word != own))
    return row[-1]


def _padded(ids: list[list[int]]) -> Feeds:
    length = max(map(len, ids))
    padded = np.array([row + [0] * (length - len(row)) for row in ids], np.int64)
    mask = np.array([[place < len(row) for place in range(length)] for row in ids], np.int64)
    return {"input_ids": padded, "attention_mask": mask}


TASKS = {"dinov2": dinov2, "minilm": minilm, "whisper": whisper}


def by_parts(graph: Graph, table: Table, feeds: Feeds) -> float:
    """The seconds that a batch like ``feeds`` takes by what each operation takes alone."""
    shape = next(iter(feeds.values())).shape
    latency = Latency(graph, table, shape[0], shape[-1])
    latency.prepare([])
    return latency.seconds({})


def rows(task: Task, only: Sequence[str] | None, parts: int, runtime: Any) -> Iterator[dict[str, Any]]:
    made = RUNTIMES[runtime]
    methods = {name: steps for name, steps in task.methods.items() if only is None or name in only}
    whole, table = made(task.graph), Table({}, measure=measuring(Workload(runtime)))
    original = [whole(feeds) for feeds in task.batches]
    longest = task.batches[-1 if task.peer is None else 0]
    yield {"method": "original", "times": 1.0, "predicted": 1.0, "by parts": 1.0, **task.score(original, original)}
    if task.peer is not None:
        found = [task.peer(feeds) for feeds in task.batches]
        yield {"method": "published ToMe", "times": "", "predicted": "", "by parts": "", **task.score(original, found)}
    for number, (name, steps) in enumerate(methods.items()):
        graph = copy_of(task.graph)
        graph.sources = dict(task.graph.sources)
        Pipeline(list(steps)).run(graph, calibration=lambda _: list(task.calibration))
        session = made(graph)
        found = [session(feeds) for feeds in task.batches]
        slow, fast = times([whole, session], longest)
        timed: Scores = {"times": slow / fast, "predicted": flops_per_token(task.graph) / flops_per_token(graph)}
        taken = [by_parts(each, table, longest) for each in (task.graph, graph)] if number < parts else []
        row = {"method": name, **timed, "by parts": taken[0] / taken[1] if taken else ""}
        yield {**row, **task.score(original, found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=[*TASKS], metavar="MODEL", help=", ".join(TASKS))
    parser.add_argument("--image", type=int, default=112, help="pixels of an enlarged picture's side")
    parser.add_argument("--merged", type=int, help="tokens fewer behind every layer of DINOv2")
    parser.add_argument("--keep", type=float, nargs="+", help="of MiniLM and Whisper, for each layer")
    parser.add_argument("--layers", help="of MiniLM and Whisper")
    parser.add_argument("--words", type=int, default=60, help="in a passage")
    parser.add_argument("--text", default="brown_k", help="that passages are of, a file in data")
    parser.add_argument("--heal", type=int, default=0, help="tokens that MiniLM is healed on")
    parser.add_argument("--learn", type=int, default=0, help="tokens that gates of MiniLM are trained on")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods, as they are called in the table")
    parser.add_argument("--parts", type=int, default=1, help="methods whose time is also predicted by parts")
    parser.add_argument("--runtime", default="onnxruntime", choices=RUNTIMES, help="torch: generated modules")
    parser.add_argument("--adapters", type=int, default=384, help="rank of what heals; 384 is all of it")
    parser.add_argument("--clips", type=int, default=12, help="recordings")
    parser.add_argument("--score", type=int, default=100, help="half as many as pictures asked about, or passages")
    parser.add_argument("--name", default="latest", help="of the file in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"tokens-{options.name}.json"
    found: dict[str, list[dict[str, Any]]] = {}
    for name in options.tasks:
        measured = found[name] = []
        for row in rows(TASKS[name](options), options.only, options.parts, options.runtime):
            measured.append(row)
            path.write_text(json.dumps(found, indent=1))
            print(time.strftime("%H:%M:%S"), name, row, file=sys.stderr, flush=True)
        show(name, [[*measured[0]], *([shown(value) for value in row.values()] for row in measured)])
    print(f"\n{path.relative_to(ROOT)}")


def shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
