"""Encoders with fewer parameters, ours and published, measured by what comes out and by what it is used for.

``python benchmarks/encoders.py minilm dinov2 whisper --keep 0.8 0.75`` prunes and factorises the linear maps of the
layers of all-MiniLM-L6-v2, DINOv2-small and Whisper tiny.en so that these parts of their parameters remain. Calibrated
on other data than scored on. `error` is ‖y - y₀‖ / ‖y₀‖ of the output y and the original's y₀ over all held-out data.

MiniLM: sentences of Brown B to F; held out sentences of Brown A. `spearman`: rank correlation of the similarities
(cosines of means over tokens) of all pairs of sentences with those of the original.
DINOv2: Fashion-MNIST at 112 pixels, for which its table of positions is resized once; training pictures, of which other
ones than were calibrated on are the neighbours of held-out test pictures. `accuracy`: share of these that the labels
of their 10 nearest neighbours name right, by the class token; `agrees`: share that they name as with the original.
Whisper: synthetic voices that read Emma; held out other voices that read Persuasion, and recordings of people.
`transcripts`: share of recordings of which the original's transcript is written to the last token; `tokens`: share of
tokens written alike.

Ours are the passes themselves, on the graph of the model: ``--ours`` takes their options as JSON, beside `keep`, of one
pass or of several in order, and may be repeated. Channels remain in multiples of 8 here, so that all methods keep as
much. Published, in peers_prune and peers_low_rank: channels by magnitude; FLAP, whose units of attention are heads
here; truncated SVD, plain and whitened (SVD-LLM).
``python benchmarks/fetch.py minilm dinov2 whisper brown fashion speech`` gets models and data.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from benchmarks.common import ROOT, show
from benchmarks.fetch import DATA, MODELS
from benchmarks.mla import RESULTS
from benchmarks.peers_low_rank import factorise, sums_of
from benchmarks.peers_prune import blocks
from benchmarks.peers_prune.blocks import Attention, Block, Mlp
from benchmarks.peers_prune.parts import held
from compiler.datafiles import recordings
from compiler.evaluate.data import data_windows
from compiler.evaluate.images import MEAN, SPREAD, picture_tensors, read_pictures
from compiler.evaluate.loading import load_model, load_tokenizer
from compiler.evaluate.metrics.features import nearest
from compiler.evaluate.metrics.similarity import pair_rows, pairs_correlation
from compiler.evaluate.texts import TextData
from compiler.frontend import capture
from compiler.ir.graph import Graph
from compiler.pipeline import Pass, Pipeline
from compiler.weights.ops.sparse import as_scatter
from passes import LowRank, Prune

Inputs = Mapping[str, Tensor]
Compute = Callable[[Inputs], Tensor]
Scores = dict[str, float]
LINEARS = {"role": "linear", "name": "*layer*"}
IMAGE = 112
COUNTS = {"train": 60_000, "t10k": 10_000}


@dataclass(frozen=True)
class Task:
    """A model with its data. ``score`` compares the outputs of the held-out data with the original's."""

    model: Any
    output: str
    calibration: list[Inputs]
    held_out: list[Inputs]
    score: Callable[[list[Tensor], list[Tensor]], Scores]
    blocks: Callable[[Any], list[Block]]


def minilm(options: argparse.Namespace) -> Task:
    path = MODELS / "minilm"
    tokenizer = load_tokenizer(path)

    def sentences(genres: str, count: int) -> list[Inputs]:
        lines = "\n".join((DATA / f"brown_{genre}.txt").read_text(encoding="utf-8") for genre in genres).splitlines()
        fit = [line for line in lines if 40 <= len(line) <= 240]
        chosen = fit[:: len(fit) // count][:count]
        return [{"input_ids": torch.tensor([tokenizer(line)["input_ids"]])} for line in chosen]

    given = sentences("bcdef", 4 * options.samples), sentences("a", 2 * options.score)
    return Task(load_model(path), "last_hidden_state", *given, similarities, bert_blocks)


def bert_blocks(model: Any) -> list[Block]:
    found: list[Block] = []
    for layer in model.encoder.layer:
        own = layer.attention.self
        found.append(Attention((own.query, own.key, own.value), layer.attention.output.dense, own.num_attention_heads))
        found.append(Mlp(layer.intermediate.dense, layer.output.dense))
    return found


def similarities(original: list[Tensor], outputs: list[Tensor]) -> Scores:
    rows = pair_rows([state[0].mean(0) for state in outputs], [state[0].mean(0) for state in original])
    return {"spearman": float(pairs_correlation(rows, np.ones((1, len(rows))))[0])}


def dinov2(options: argparse.Namespace) -> Task:
    train, labels = fashion("train")
    test, truth = fashion("t10k")
    first, known, asked = options.samples, 4 * options.score, 2 * options.score
    held_out = [*train[first : first + known], *test[:asked]]
    score = partial(neighbours, labels=labels[first : first + known], truth=truth[:asked])
    given = [[{"pixel_values": picture(each)} for each in part] for part in (train[:first], held_out)]
    return Task(at_size(load_model(MODELS / "dinov2")), "last_hidden_state", *given, score, dinov2_blocks)


def fashion(part: str) -> tuple[np.ndarray, Tensor]:
    """Pictures, uint8 [count, 28, 28], and labels of a part of Fashion-MNIST."""

    found = read_pictures(DATA / "fashion", part, COUNTS[part])
    return found.pixels, found.labels


def picture(grey: np.ndarray) -> Tensor:
    """What the model gets: [1, 3, 112, 112], scaled as its training pictures were."""
    return next(picture_tensors(grey[None], (IMAGE, IMAGE), MEAN, SPREAD))


def at_size(model: Any) -> Any:
    """DINOv2 for pictures of 112 pixels: as the model resizes its table of positions for them, done once."""
    config = Dinov2Config(**{**model.config.to_dict(), "image_size": IMAGE})
    state = model.state_dict()
    tokens = torch.zeros(1, (IMAGE // config.patch_size) ** 2 + 1, config.hidden_size)
    table = model.embeddings.interpolate_pos_encoding(tokens, IMAGE, IMAGE)
    state["embeddings.position_embeddings"] = table.detach()
    small = Dinov2Model(config)
    small.load_state_dict(state)
    return small.eval()


def dinov2_blocks(model: Any) -> list[Block]:
    found: list[Block] = []
    for layer in model.encoder.layer:
        own = layer.attention
        heads = model.config.num_attention_heads
        found.append(Attention((own.q_proj, own.k_proj, own.v_proj), own.o_proj, heads))
        found.append(Mlp(layer.mlp.fc1, layer.mlp.fc2))
    return found


def neighbours(original: list[Tensor], outputs: list[Tensor], labels: Tensor, truth: Tensor) -> Scores:
    def named(states: list[Tensor]) -> Tensor:
        features = torch.stack([state[0, 0] for state in states])
        return nearest(features[: len(labels)], labels, features[len(labels) :])

    found = named(outputs)
    share = (found == truth).double().mean().item()
    return {"accuracy": share, "agrees": (found == named(original)).double().mean().item()}


def whisper(options: argparse.Namespace) -> Task:
    path = MODELS / "whisper"
    model = load_model(path)

    def clips(name: str, count: int) -> list[Inputs]:
        folder = DATA / "speech" / name
        data = TextData(folder, min(count, len(recordings(folder))), 128)
        return [window.arguments for window in data_windows(model, path, data)]

    held_out = clips("people", options.score) + clips("persuasion", options.score)
    suppressed = model.generation_config.suppress_tokens
    score = partial(transcripts, suppressed=suppressed)
    return Task(model, "logits", clips("emma", options.samples), held_out, score, whisper_blocks)


def whisper_blocks(model: Any) -> list[Block]:
    found: list[Block] = []
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        attentions = [layer.self_attn] + ([layer.encoder_attn] if hasattr(layer, "encoder_attn") else [])
        for own in attentions:
            found.append(Attention((own.q_proj, own.k_proj, own.v_proj), own.out_proj, own.num_heads))
        found.append(Mlp(layer.fc1, layer.fc2))
    return found


def transcripts(original: list[Tensor], outputs: list[Tensor], suppressed: Sequence[int]) -> Scores:
    def written(logits: Tensor) -> Tensor:
        allowed = logits[0, 1:-1].clone()  # the first tokens are given
        allowed[:, suppressed] = -torch.inf
        return allowed.argmax(-1)

    alike = [written(x) == written(y) for x, y in zip(original, outputs, strict=True)]
    same = sum(bool(each.all()) for each in alike) / len(alike)
    return {"transcripts": same, "tokens": torch.cat(alike).double().mean().item()}


TASKS = {"minilm": minilm, "dinov2": dinov2, "whisper": whisper}


def compute(model: Any, output: str) -> Compute:
    extra = {"use_cache": False} if output == "logits" else {}

    def call(inputs: Inputs) -> Tensor:
        with torch.inference_mode():
            return getattr(model(**inputs, **extra), output)

    return call


@dataclass(frozen=True)
class Made:
    """A smaller model: what it computes, how many numbers it saves, the processor seconds it took."""

    compute: Compute
    saved: int
    seconds: float


def peer(task: Task, method: str, keep: float) -> Made:
    started = time.process_time()
    model = copy.deepcopy(task.model)
    parts, call = task.blocks(model), compute(model, task.output)

    def forward() -> None:
        for inputs in task.calibration:
            call(inputs)

    if method in ("magnitude", "flap"):
        getattr(blocks, method)(parts, forward, keep)
        saved = held(task.model) - held(model)
    else:
        named = blocks.linears_of(parts)
        saved = factorise(named, sums_of(named, forward), keep, method)
    return Made(call, saved, time.process_time() - started)


def ours(task: Task, passes: Sequence[Pass]) -> Made:
    started = time.process_time()
    graph = capture(task.model)
    before = numbers(graph)
    given = [{name: inputs[name] for name in graph.inputs} for inputs in task.calibration]
    Pipeline(passes).run(graph, calibration=lambda _: given)
    seconds = time.process_time() - started
    module = graph.to_torch()

    def call(inputs: Inputs) -> Tensor:
        with torch.inference_mode():
            return module(**{name: inputs[name] for name in graph.inputs})[task.output]

    return Made(call, before - numbers(graph), seconds)


def numbers(graph: Graph) -> int:
    """What the weights hold, as many bytes each as they take; of sparse ones the values that remain and their mask."""
    sparse = {param: as_scatter(param.expr) for param in graph.params.values() if param.persistent}
    parts = [(param, found.args if found is not None else (param.expr,)) for param, found in sparse.items()]
    return sum(sum(part.type.nbytes for part in own) // param.storage.itemsize for param, own in parts)


PEERS = ("magnitude", "flap", "svd", "svd-llm")
OURS = {"prune": (Prune, {"align": 8}), "low-rank": (LowRank, {"where": LINEARS})}
DEFAULT = [{"prune": {}}, {"prune": {"sizes": "by-layer"}}, {"low-rank": {}}]


def made_all(task: Task, options: argparse.Namespace) -> Iterator[tuple[str, float, Made]]:
    for keep in options.keep:
        for method in PEERS if options.peers else ():
            yield method, keep, peer(task, method, keep)
        for wanted in options.ours or DEFAULT:
            passes = [made_by(name, {"keep": keep, **own}) for name, own in wanted.items()]
            yield f"ours: {', then '.join(map(shown, wanted, wanted.values()))}", keep, ours(task, passes)


def made_by(name: str, options: Mapping[str, Any]) -> Pass:
    cls, given = OURS[name]
    return TypeAdapter(cls).validate_python({**given, **options})


def shown(name: str, options: Mapping[str, Any]) -> str:
    return " ".join([name, ", ".join(f"{key} {value}" for key, value in options.items())]).strip()


def rows(task: Task, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    original = [compute(task.model, task.output)(inputs) for inputs in task.held_out]
    whole = blocks.numbers_of(task.blocks(task.model))
    yield {"method": "original", "keep": 1.0, "kept": 1.0, "error": 0.0, "CPU s": 0.0, **task.score(original, original)}
    for method, keep, made in made_all(task, options):
        outputs = [made.compute(inputs) for inputs in task.held_out]
        row = {"method": method, "keep": keep, "kept": 1 - made.saved / whole, "error": error(original, outputs)}
        yield {**row, "CPU s": made.seconds, **task.score(original, outputs)}


def error(original: list[Tensor], outputs: list[Tensor]) -> float:
    pairs = list(zip(original, outputs, strict=True))
    lost = sum((x.double() - y.double()).square().sum() for x, y in pairs)
    return float((torch.as_tensor(lost) / sum(x.double().square().sum() for x, _ in pairs)).sqrt())


def main() -> None:
    parser = parser_of(str(__doc__), TASKS)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.75], help="parts that remain")
    parser.add_argument("--ours", type=json.loads, action="append", help='such as {"prune": {"sizes": "by-layer"}}')
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--samples", type=int, default=64, help="pictures or clips to calibrate on, sentences by four")
    parser.add_argument("--score", type=int, default=100, help="half as many as pictures asked about, or sentences")
    options = parser.parse_args()
    measure("encoders", options, lambda name: rows(TASKS[name](options), options), digits=3)


def parser_of(description: str, tasks: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The options that benchmarks of several models have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=[*tasks], metavar="MODEL", help=", ".join(tasks))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="latest", help="of the file in benchmarks/results")
    return parser


def measure(
    title: str, options: argparse.Namespace, rows_of: Callable[[str], Iterable[dict[str, Any]]], *, digits: int
) -> None:
    """Measure every task's rows, keep them in benchmarks/results as they come, and print them as a table."""
    torch.set_num_threads(options.threads)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{title}-{options.name}.json"
    found: dict[str, list[dict[str, Any]]] = {}
    for name in options.tasks:
        torch.manual_seed(0)
        measured = found[name] = []
        for row in rows_of(name):
            measured.append(row)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(time.strftime("%H:%M:%S"), name, row, file=sys.stderr, flush=True)
        shown = [[f"{x:.{digits}f}" if isinstance(x, float) else str(x) for x in row.values()] for row in measured]
        show(name, [[*measured[0]], *shown])
    print(f"\n{path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
