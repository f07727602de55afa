"""Rounding with and without equivalence transforms before it, on MiniLM, DINOv2 and SmolLM2, in one run.

``python benchmarks/transforms.py minilm dinov2 smollm2`` rounds the linear maps of the layers to nearest, weights alone
(`W4 g128`: 4 bits, groups of 128 inputs) or both (`W8A8`: 8 bits, weights a row, activations a token), as they are and
after `smooth` or `rotate`, which change nothing by themselves. ``--schemes W3g128 W8A8`` picks schemes.

Calibration: sentences or windows of Brown B, training pictures of Fashion-MNIST. Held out: Brown K, test pictures.
`error` is ‖y - y₀‖ / ‖y₀‖ of the output y and the original's y₀; `KL` that of the original's next token and the rounded
model's, in nats, as the windows' mean. `sites` are scaled or rotated places, `left` those that stay as they are.
``python benchmarks/fetch.py minilm dinov2 smollm2 brown fashion`` gets models and data.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.common import SMOLLM2
from benchmarks.encoders import at_size, error, fashion, measure, parser_of, picture
from benchmarks.fetch import DATA, MODELS
from compiler.calibration.fidelity import Fidelity
from compiler.evaluate.loading import load_model, load_tokenizer
from compiler.frontend import capture
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of
from compiler.ir.select import resolve
from compiler.pipeline import Pass, Pipeline
from compiler.weights.ops.quant import quantise
from passes import Rotate, Smooth

Inputs = Mapping[str, Tensor]
WHERE = {"role": "linear", "name": "*layer*"}
LENGTH = 512  # tokens of a window


@dataclass(frozen=True)
class Scheme:
    """How many bits weights have, in which groups (0: a row), and activations (0: they are not rounded)."""

    bits: int
    group: int
    activations: int

    @staticmethod
    def parse(text: str) -> Scheme:
        found = re.fullmatch(r"W(\d)(?:g(\d+))?(?:A(\d))?", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"`{text}` is no scheme such as W4g128 or W8A8")
        return Scheme(*(int(part or 0) for part in found.groups()))

    def __str__(self) -> str:
        group = f" g{self.group}" if self.group else ""
        return f"W{self.bits}{group}" + (f" A{self.activations}" if self.activations else "")


@dataclass(frozen=True)
class Task:
    """A graph with its data; ``distance`` of a rounded graph from the original, called ``metric``."""

    graph: Graph
    calibration: list[Inputs]
    distance: Callable[[Graph], float]
    metric: str
    schemes: Sequence[str]


def minilm(options: argparse.Namespace) -> Task:
    tokenizer = load_tokenizer(MODELS / "minilm")

    def sentences(genre: str, count: int) -> list[Inputs]:
        lines = (DATA / f"brown_{genre}.txt").read_text(encoding="utf-8").splitlines()
        fit = [line for line in lines if 40 <= len(line) <= 240]
        ids = (tokenizer(line)["input_ids"] for line in fit[:: len(fit) // count][:count])
        return [{"input_ids": torch.tensor([each])} for each in ids]

    graph = capture(load_model(MODELS / "minilm"))
    given = sentences("b", 4 * options.samples), sentences("k", 2 * options.score)
    return encoder(graph, *given)


def dinov2(options: argparse.Namespace) -> Task:
    graph = capture(at_size(load_model(MODELS / "dinov2")))
    train, test = fashion("train")[0][: options.samples], fashion("t10k")[0][: options.score]
    return encoder(graph, *([{"pixel_values": picture(each)} for each in part] for part in (train, test)))


def encoder(graph: Graph, calibration: list[Inputs], held_out: list[Inputs]) -> Task:
    original = list(outputs(graph, held_out))

    def distance(found: Graph) -> float:
        return error(original, list(outputs(found, held_out)))

    return Task(graph, calibration, distance, "error", ("W4g128", "W3g128", "W8A8"))


def outputs(graph: Graph, batches: Sequence[Inputs]) -> Iterator[Tensor]:
    module, name = graph.to_torch(), next(iter(graph.outputs))
    for inputs in batches:
        with torch.inference_mode():
            yield module(**{key: inputs[key] for key in graph.inputs})[name]


def smollm2(options: argparse.Namespace) -> Task:
    graph, tokenizer = capture(SMOLLM2), load_tokenizer(SMOLLM2)

    def windows(genre: str, count: int) -> list[Inputs]:
        ids = torch.tensor(tokenizer((DATA / f"brown_{genre}.txt").read_text(encoding="utf-8"))["input_ids"])
        starts = range(0, len(ids) - LENGTH, (len(ids) - LENGTH) // count)
        return [{"input_ids": ids[None, start : start + LENGTH]} for start in starts][:count]

    fidelity = Fidelity(graph, windows("k", max(2, options.score // 8)))
    return Task(graph, windows("b", options.samples), fidelity.distance, "KL", ("W3g64",))


TASKS = {"minilm": minilm, "dinov2": dinov2, "smollm2": smollm2}


def ways(scheme: Scheme) -> list[tuple[str, list[Pass]]]:
    """Transforms by name."""

    def smooth(**given: Any) -> Pass:
        return Smooth(where=WHERE, bits=scheme.bits, group=scheme.group, **given)

    smoothquant: list[tuple[str, list[Pass]]] = [
        ("smooth: smoothquant", [smooth(method="smoothquant")]),
        ("smooth: smoothquant, insert", [smooth(method="smoothquant", insert=True)]),
    ]
    fitted: list[tuple[str, list[Pass]]] = [
        ("smooth: awq", [smooth(method="awq")]),
        ("smooth: fit", [smooth()]),
        ("smooth: fit, insert", [smooth(insert=True)]),
    ]
    rotated: list[tuple[str, list[Pass]]] = [
        ("rotate: values", [Rotate(what="values")]),
        ("rotate: values, stream, mlp", [Rotate(what=("values", "stream", "mlp"))]),
    ]
    return [("as it is", []), *(smoothquant if scheme.activations else fitted), *rotated]


def rounded(graph: Graph, scheme: Scheme) -> None:
    """Round the selected weights to nearest, and what enters them."""
    chosen = resolve(graph, WHERE)
    for param in chosen:
        param.expr = quantise(param.expr, scheme.bits, scheme.group, scale_dtype=param.storage)
    for node in graph.nodes_named("linear") if scheme.activations else ():
        if node.input(1) in chosen:
            attrs = {"bits": scheme.activations}
            graph.set_input(node, 0, graph.op("fake_quantize", [node.input(0)], attrs, scope=node.scope, before=node))


def rows(task: Task, schemes: Sequence[Scheme]) -> Iterator[dict[str, Any]]:
    for scheme in schemes:
        for name, steps in ways(scheme):
            graph, started = copy_of(task.graph), time.process_time()
            report = Pipeline(steps).run(graph, calibration=lambda _: task.calibration)
            seconds = time.process_time() - started
            rounded(graph, scheme)
            places = [(len(entry.rewritten), len(entry.skipped)) for entry in report.passes] or [(0, 0)]
            row = {"scheme": str(scheme), "before": name, task.metric: task.distance(graph)}
            yield {**row, "sites": places[0][0], "left": places[0][1], "CPU s": seconds}


def main() -> None:
    parser = parser_of(str(__doc__), TASKS)
    parser.add_argument("--schemes", type=Scheme.parse, nargs="+", metavar="SCHEME")
    parser.add_argument(
        "--samples", type=int, default=32, help="pictures or windows to calibrate on, sentences by four"
    )
    parser.add_argument("--score", type=int, default=64, help="pictures, half of the sentences, or eight times windows")
    options = parser.parse_args()

    def rows_of(name: str) -> Iterator[dict[str, Any]]:
        task = TASKS[name](options)
        yield from rows(task, options.schemes or [Scheme.parse(text) for text in task.schemes])

    measure("transforms", options, rows_of, digits=4)


if __name__ == "__main__":
    main()
