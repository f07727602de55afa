"""Healing after conversion: what it reaches from our start, and from TransMLA's at equal tokens.

``python benchmarks/mla_heal.py --cache 192`` converts SmolLM2-135M twice to as many cached values per token and layer,
by `gqa-to-mla` and by TransMLA's published steps, trains both with `heal` on the same windows in the same order, and
scores both before and after on texts that nothing was calibrated on. The windows are a random choice of Brown B to F;
TransMLA is calibrated on ``--calibration`` of them,
ours takes as few as it needs. ``--starts ours`` leaves the comparison out; ``--heal`` takes
options of the pass as JSON.

Scores are those of mla.py. Seconds are processor seconds of a process, with its wall clock and peak memory beside them.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.common import ROOT, SMOLLM2, run, show
from benchmarks.mla import RESULTS, base, plain_checkpoint, score
from benchmarks.mla_report import mean
from benchmarks.mla_windows import TEXTS, Windows, cut
from benchmarks.peers_mla import transmla
from benchmarks.peers_mla.as_graph import TransMla
from benchmarks.peers_mla.attention import shape_of
from compiler import Pipeline, capture
from compiler.calibration.sweep import token_batches
from compiler.evaluate import load_model
from compiler.ir.graph import Graph
from compiler.pipeline import Observer, Pass, PassReport
from passes import GqaToMla, Heal


class Scorer(Observer):
    """Scores the graph after every pass, and counts the processor seconds of the pass alone."""

    def __init__(self, texts: dict[str, Path]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._texts = texts
        self._started = 0.0

    def before(self, index: int, step: Pass, graph: Graph) -> None:
        self._started = time.process_time()

    def after(self, index: int, step: Pass, graph: Graph, report: PassReport) -> None:
        seconds = time.process_time() - self._started
        tokens = sum(entry.numbers.get("tokens", 0) for entry in report.rewritten if not entry.scope)
        texts = {name: asdict(score(AsModel(graph), file)) for name, file in self._texts.items()}
        trials = [[trial.what, trial.distance, trial.chosen] for trial in report.trials]
        peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row = {"pass": report.name, "cpu_seconds": seconds, "peak_rss": peak_rss, "trained_tokens": tokens}
        self.rows.append({**row, "trials": trials, "texts": texts})


class AsModel:
    """A graph called as transformers' models are."""

    def __init__(self, graph: Graph) -> None:
        self._module = graph.to_torch()

    def __call__(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(**self._module(input_ids=input_ids))


def main() -> None:
    options = parse()
    if options.job:
        do_job(json.loads(options.job))
        return
    model = plain_checkpoint(options.model)
    windows = cut(
        model, argparse.Namespace(**{**vars(options), "calibration": options.samples, "seeds": [options.seed]})
    )
    original = base(model, windows, options)
    kept = {name: value for name, value in vars(options).items() if name not in ("model", "job")}
    found = {"model": str(options.model), "settings": kept, "original": original, "starts": {}}
    path = RESULTS / f"mla-heal-{options.name or time.strftime('%Y%m%d-%H%M%S')}.json"
    RESULTS.mkdir(exist_ok=True)
    for start in options.starts:
        found["starts"][start] = healed(model, windows, start, options)
        path.write_text(json.dumps(found, indent=1))
    report(found)
    print(f"\n{path.relative_to(ROOT)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=lambda text: Path(text).absolute(), default=SMOLLM2)
    parser.add_argument("--cache", type=int, default=192, help="values per token and layer")
    parser.add_argument("--starts", nargs="+", choices=["ours", "transmla"], default=["ours", "transmla"])
    parser.add_argument("--heal", type=json.loads, default={}, help="options of heal, as JSON")
    parser.add_argument("--texts", nargs="+", choices=[*TEXTS], default=["wikipedia", "persuasion", "brown_k"])
    parser.add_argument("--windows", type=int, default=8, help="windows of each text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--calibration", type=int, default=64, help="windows that TransMLA is calibrated on")
    parser.add_argument("--samples", type=int, default=448, help="windows to heal on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the file in benchmarks/results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def healed(model: Path, windows: Windows, start: str, options: argparse.Namespace) -> dict[str, Any]:
    """The scores after conversion and after healing, by a process of its own."""
    job = {
        "model": str(model),
        "start": start,
        "cache": options.cache,
        "heal": options.heal,
        "converting": options.calibration,
        "windows": str(windows.folder / f"{windows.calibration[options.seed]}.pt"),
        "texts": {name: str(windows.folder / file) for name, file in windows.texts.items()},
        "threads": options.threads,
    }
    done = run([sys.executable, __file__, "--job", json.dumps(job)], OMP_NUM_THREADS=str(options.threads))
    return {"seconds": done.seconds, "passes": json.loads(done.output.splitlines()[-1])}


def do_job(job: dict[str, Any]) -> None:
    """Convert, heal, and print the scores as JSON."""
    torch.set_num_threads(job["threads"])
    windows = torch.load(job["windows"])
    scorer = Scorer({name: Path(file) for name, file in job["texts"].items()})
    graph = capture(job["model"])
    steps = [conversion(job, windows), Heal(**{name.replace("-", "_"): v for name, v in job["heal"].items()})]
    Pipeline(steps).run(graph, observers=[scorer], calibration=lambda graph: token_batches(graph, windows))
    print(json.dumps(scorer.rows))


def conversion(job: dict[str, Any], windows: Tensor) -> Pass:
    """The pass that makes the start."""
    model = load_model(job["model"])
    shape = shape_of(model)
    if job["start"] == "ours":
        return GqaToMla(cache=job["cache"] / (2 * shape.kv))
    rank, rope_dim = transmla.split(shape, job["cache"])
    step = max(1, len(windows) // job["converting"])
    return TransMla(model, windows[::step][: job["converting"]], rank, rope_dim)


def report(found: dict[str, Any]) -> None:
    names = found["settings"]["texts"]
    losses = {name: mean(found["original"]["texts"][name]) for name in names}
    rows = [["start", "after", *names, *(f"{name}: KL" for name in names), "trained tokens", "CPU s", "peak MiB"]]
    for start, result in found["starts"].items():
        for row in result["passes"]:
            rises = [f"{mean(row['texts'][name]['losses']) - losses[name]:+.4f}" for name in names]
            divergences = [f"{row['texts'][name]['kl']:.4f}" for name in names]
            costs = [f"{row['trained_tokens']:g}", f"{row['cpu_seconds']:.0f}", f"{row['peak_rss'] / 2**20:.0f}"]
            rows.append([start, row["pass"], *rises, *divergences, *costs])
    show("Loss above the original in nats per token, and KL(original || model), before and after healing", rows)


if __name__ == "__main__":
    main()
