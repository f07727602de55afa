"""What a converted attention cache does at long range: ``python benchmarks/mla_context.py ORIGINAL CONVERTED ...``.

Checkpoint directories (or .gguf files) of one tokenizer, loaded by plain transformers. Three measurements, all through
the live cache, which prompts fill in pieces:

- loss by position in windows of ``--length`` tokens, so that nothing hides behind a mean over short ones;
- a needle in a haystack: one sentence with a fact, at several depths of a text it does not belong to, then a question.
  Scored by the log-probability of the answer (nats, summed over its tokens) and by whether greedy decoding gives it;
- decoding time per token against the tokens in the cache, all models in turns, and the bytes that the cache holds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.common import ROOT, show
from compiler.evaluate import load_model, load_tokenizer
from compiler.evaluate.metrics.base import stacked
from compiler.evaluate.metrics.needle import FACTS, answered
from compiler.evaluate.metrics.position import losses_by_position, window_losses
from compiler.evaluate.reader import Reader

RESULTS = ROOT / "benchmarks" / "results"
TEXT = ROOT / "data" / "northanger.txt"


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.models[0], trust_remote_code=True)
    start = list(tokenizer("")["input_ids"])
    ids = start + tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    filler = torch.tensor(ids)
    found: dict[str, Any] = {"models": [str(path) for path in options.models]}
    if "positions" in options.measure:
        found["positions"] = [positions(load(path), filler, options) for path in options.models]
        report_positions(found)
    if "needle" in options.measure:
        found["needle"] = [needles(load(path), tokenizer, filler, options) for path in options.models]
        report_needles(found)
    if "decode" in options.measure:
        found["decode"] = decode([load(path) for path in options.models], filler, options)
        report_decode(found)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"mla-context-{options.name or time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(found, indent=1))
    print(f"\n{path.relative_to(ROOT)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="the original first")
    measures = ["positions", "needle", "decode"]
    parser.add_argument("--measure", nargs="+", choices=measures, default=measures)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--windows", type=int, default=2, help="windows for the loss by position")
    parser.add_argument("--length", type=int, default=4096, help="tokens of such a window")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="of haystacks")
    parser.add_argument("--facts", type=int, default=len(FACTS), help="needles tried at each depth and length")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2**power for power in range(7, 14)])
    parser.add_argument("--rounds", type=int, default=16, help="tokens decoded by each model at each context")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the file in benchmarks/results")
    return parser.parse_args()


def load(path: Path) -> Any:
    return load_model(path, trust_remote_code=True)


def positions(model: Any, filler: Tensor, options: argparse.Namespace) -> dict[str, float]:
    """Mean loss in nats of the tokens up to position 128, up to 256, and so on."""
    windows = filler.split(options.length)[: options.windows]
    found = stacked([losses_by_position(window_losses(model, ids)) for ids in windows])
    return {part: float(rows[:, 0].sum() / rows[:, 1].sum()) for part, rows in found.items()}


def needles(model: Any, tokenizer: Any, filler: Tensor, options: argparse.Namespace) -> list[dict[str, float]]:
    """Per length and depth: mean log-probability of the answers, and the share that greedy decoding gives."""
    found: list[dict[str, float]] = []
    for length in options.lengths:
        for depth in options.depths:
            scored = [answered(model, tokenizer, filler, fact, length, depth) for fact in FACTS[: options.facts]]
            logs, matches = zip(*scored, strict=True)
            found.append({"length": length, "depth": depth, "log_probability": mean(logs), "greedy": mean(matches)})
    return found


def decode(models: Sequence[Any], filler: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Per context length: every model's median seconds per token, the models in turns, and bytes of its cache."""
    readers = [Reader(model) for model in models]
    longest = min(model.config.get_text_config().max_position_embeddings for model in models)
    found: list[dict[str, Any]] = []
    for context in options.contexts:
        if context > min(longest, len(filler)):
            break
        for reader in readers:
            reader.read_up_to(filler[: context - options.rounds])
        turns = [[timed(reader, filler) for reader in readers] for _ in range(options.rounds)]
        seconds = [median(times) for times in zip(*turns, strict=True)]
        found.append({"context": context, "seconds": seconds, "bytes": [reader.bytes() for reader in readers]})
    return found


def timed(reader: Reader, filler: Tensor) -> float:
    ids = filler[reader.length : reader.length + 1]
    started = time.perf_counter()
    reader.read(ids)
    return time.perf_counter() - started


def report_positions(found: dict[str, Any]) -> None:
    first, *others = found["positions"]
    rows = [["tokens", "perplexity of the original", *(f"of {Path(name).name} (loss)" for name in found["models"][1:])]]
    for bucket, loss in first.items():
        cells = [f"{math.exp(other[bucket]):.2f} ({other[bucket] - loss:+.3f})" for other in others]
        rows.append([bucket, f"{math.exp(loss):.2f}", *cells])
    show("Perplexity by position (loss above the original, nats)", rows)


def report_needles(found: dict[str, Any]) -> None:
    rows = [["tokens", "depth", *(Path(name).name for name in found["models"])]]
    for cells in zip(*found["needle"], strict=True):
        scores = [f"{cell['log_probability']:.2f} / {cell['greedy']:.0%}" for cell in cells]
        rows.append([str(cells[0]["length"]), f"{cells[0]['depth']:.0%}", *scores])
    show("Needle: log-probability of the answer, nats / share of answers found greedily", rows)


def report_decode(found: dict[str, Any]) -> None:
    names = [Path(name).name for name in found["models"]]
    rows = [["tokens cached", *(f"{name}: ms, x original, cache MB (x)" for name in names)]]
    for row in found["decode"]:
        first, held = row["seconds"][0], row["bytes"][0]
        cells = [
            f"{seconds * 1e3:.1f}, {seconds / first:.2f}, {size / 1e6:.2f} ({size / held:.2f})"
            for seconds, size in zip(row["seconds"], row["bytes"], strict=True)
        ]
        rows.append([str(row["context"]), *cells])
    show("Decoding one token, medians, models in turns", rows)


if __name__ == "__main__":
    main()
