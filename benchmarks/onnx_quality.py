"""Perplexity of ONNX models in ONNX Runtime: ours, and those of onnxruntime-genai's builder, on the same text.

    python benchmarks/onnx_quality.py [--models NAME ...] [--genai DIR ...] [--text FILE] [--alone]

Models and DIRs are those of `benchmarks/onnx_speed.py`. Each window of the text is read as one prompt; `--alone` by the
model for single tokens, also where one for prompts lies beside it. Sizes are of the tensors that the model reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx

from backends.onnx.runner import Runner
from benchmarks.common import ROOT
from benchmarks.onnx_speed import PASSES, Built, written
from compiler.console import table


class Alone(Runner):
    """A model that reads prompts itself, whatever lies beside it."""

    def __init__(self, path: Path, *, threads: int) -> None:
        super().__init__(path, threads=threads)
        self._prompts = self._session


def megabytes(model: Path) -> float:
    """The tensors that ``model`` refers to; those in the model file itself are a few hundred bytes."""
    tensors = onnx.load(model, load_external_data=False).graph.initializer
    entries = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors]
    places = {(entry["location"], entry["offset"]): int(entry["length"]) for entry in entries if entry}
    return sum(places.values()) / 1e6


def windows(directory: Path, text: Path, count: int, length: int) -> list[np.ndarray]:
    """Token numbers [1, length] from places spread over the text."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [np.array([ids[start : start + length]]) for start in starts]


def losses(model: Runner, given: list[np.ndarray]) -> np.ndarray:
    """The mean loss of each window, in nats a token."""
    found: list[float] = []
    for ids in given:
        logits = model.logits(ids)[0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, ids[0, 1:, None], -1)[:, 0]
        found.append(float((np.log(np.exp(logits).sum(-1)) - chosen).mean()))
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["fp32", "int4, blocks of 32"], choices=list(PASSES))
    parser.add_argument("--genai", type=Path, nargs="*", default=[])
    parser.add_argument("--text", type=Path, default=ROOT / "benchmarks" / "data" / "persuasion.txt")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--alone", action="store_true", help="without models for prompts")
    options = parser.parse_args()
    paths = written(options.models)
    given = windows(next(iter(paths.values())).parent, options.text, options.windows, options.length)
    models = {name: (Alone if options.alone else Runner)(path, threads=1) for name, path in paths.items()}
    models |= {f"genai: {folder.name}": Built(folder / "model.onnx", threads=1) for folder in options.genai}
    rows = [("", "MB", "loss", "perplexity")]
    for name, model in models.items():
        loss = losses(model, given)
        shown = (f"{megabytes(model.path):.1f}", f"{loss.mean():.4f}", f"{np.exp(loss.mean()):.2f}")
        rows.append((name, *shown))
    print(f"{options.text.name}, {options.windows} windows of {options.length} tokens")
    print(table(rows))


if __name__ == "__main__":
    main()
