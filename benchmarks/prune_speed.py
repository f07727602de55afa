"""How fast models get that are pruned for a speed: predicted by the table of latencies, and reached.

``python benchmarks/prune_speed.py`` prunes MiniLM (a sentence of 128 tokens) and SmolLM2-135M (a prompt of 128 tokens)
for 1.5 times the speed on ONNX Runtime, one thread of the CPU. The command runs the recipe, transformers loads the
result, torch.onnx.export writes the original and the pruned model as ONNX, and both run in turns; of each the median
of the thread's own time counts. Of the prompt's logits those of the last token are computed, as generation does. The
loss is measured on text that nothing was calibrated on: above the original in nats, and relative error of what an
encoder yields.
Needs onnx, onnxruntime and onnxscript: ``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn

from benchmarks.common import COMMAND, MINILM, ROOT, SMOLLM2, WORK, run, show
from compiler.evaluate import load_model

DATA = ROOT / "benchmarks" / "data"
MODELS = {"minilm": MINILM, "smollm2": SMOLLM2}
PRUNED: dict[str, list[str]] = {"minilm": ["channels", "groups"], "smollm2": ["channels", "groups"]}
METRICS = {"minilm": ["relative-error", "cosine"], "smollm2": ["perplexity", "kl"]}
LENGTHS = {"minilm": 128, "smollm2": 512}


class Last(nn.Module):
    """What is timed: the hidden states of an encoder, or the logits of a decoder's last token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        own = getattr(model, "config", None)
        self.options: dict[str, Any] = {"use_cache": False} if hasattr(own, "use_cache") else {}
        if model.get_output_embeddings() is not None:  # pyright: ignore[reportCallIssue]
            self.options["logits_to_keep"] = 1

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, **self.options)[0]


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    rows = [["model", "pruned", "asked", "predicted", "reached", "ms before", "ms after", "parameters", "loss"]]
    for name in options.models:
        rows.append(row(name, options))
    show("Pruned for speed on ONNX Runtime, one thread", rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--faster", type=float, default=1.5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--samples", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--evaluate", type=int, default=8, help="windows to measure the loss on")
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--options", type=json.loads, default={}, help="further options of the pass, as JSON")
    parser.add_argument("--again", action="store_true", help="measure what an earlier run has written")
    return parser.parse_args()


def row(name: str, options: argparse.Namespace) -> list[str]:
    out = WORK / f"prune-speed-{name}"
    if not options.again:
        prune(name, out, options)
    report = json.loads((out / "compress" / "report.json").read_text())
    (speed,) = (done for done in report["passes"][0]["rewritten"] if "milliseconds_after" in done["numbers"])
    numbers = speed["numbers"]
    before, after = in_turns([runner(MODELS[name], options), runner(out, options)], options.rounds)
    left = report["ledger"]["after"]["parameters"] / report["ledger"]["before"]["parameters"]
    pruned = ", ".join(report["passes"][0]["options"]["what"])
    predicted = numbers["milliseconds_before"] / numbers["milliseconds_after"]
    return [name, pruned, f"{options.faster:.2f}", f"{predicted:.2f}", f"{before / after:.2f}", f"{1e3 * before:.1f}",
            f"{1e3 * after:.1f}", f"{left:.1%}", loss(report["evaluation"])]  # fmt: skip


def prune(name: str, out: Path, options: argparse.Namespace) -> None:
    length = LENGTHS[name]
    wanted = {"what": PRUNED[name], "faster": options.faster, "tokens": options.tokens, **options.options}
    recipe = {
        "model": str(MODELS[name]),
        "calibration": {"data": str(DATA / "emma.txt"), "samples": options.samples * 512 // length, "length": length},
        "passes": [{"prune": wanted}],
        "evaluate": {"data": str(DATA / "persuasion.txt"), "samples": options.evaluate, "length": length,
                     "metrics": METRICS[name]},
    }  # fmt: skip
    WORK.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".json")
    path.write_text(json.dumps(recipe))
    shutil.rmtree(out, ignore_errors=True)
    run([*COMMAND, str(path), "-o", str(out), "--quiet"], OMP_NUM_THREADS="1")


def runner(path: Path, options: argparse.Namespace) -> Callable[[], object]:
    """Runs the model at ``path`` as ONNX."""
    import onnxruntime

    model = Last(load_model(path, trust_remote_code=True).float()).eval()
    ids = torch.arange(1000, 1000 + options.tokens)[None]
    target = WORK / "prune-speed.onnx"
    with torch.no_grad():
        wanted = model(ids)
        torch.onnx.export(model, (ids,), target, dynamo=True, external_data=True, verbose=False)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(target, settings, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: ids.numpy()}
    np.testing.assert_allclose(session.run(None, feeds)[0], wanted.numpy(), rtol=1e-2, atol=1e-2)
    return lambda: session.run(None, feeds)


def in_turns(runners: list[Callable[[], object]], rounds: int) -> list[float]:
    """The median seconds of each, in which nobody else has run on its processor."""
    times: list[list[float]] = [[] for _ in runners]
    for turn in range(rounds + 3):
        for runner, own in zip(runners, times, strict=True):
            started = time.thread_time()
            runner()
            if turn >= 3:
                own.append(time.thread_time() - started)
    return [median(own) for own in times]


def loss(found: dict[str, Any]) -> str:
    metrics = {name: estimate["value"] for name, estimate in found["metrics"].items()}
    if "perplexity" not in metrics:
        return f"error {metrics['relative-error']:.3f}, cosine {metrics['cosine']:.3f}"
    nats = math.log(metrics["perplexity"] / found["reference"]["perplexity"]["value"])
    return f"{nats:+.3f} nats, KL {metrics['kl']:.3f}"


if __name__ == "__main__":
    main()
