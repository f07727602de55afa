"""Factorised decoders, ours and published ones, of as many parameters, on the same windows in one run.

``python benchmarks/low_rank.py --keep 0.8 0.6 --windows 8`` factorises the linear maps of SmolLM2-135M's layers by
every method so that these parts of their parameters remain, and scores the results on texts that nothing was
calibrated on.
Calibration: windows of Brown B to F; seed 0 takes the first ones. All peers of a run are calibrated once.

Ours is the real thing: the command runs a recipe with `low-rank`, transformers loads the generated class that it wrote.
``--ours`` takes options of the pass as JSON, beside `where` and `keep`, and may be repeated; ``--only`` picks methods.
Scores and costs are those of mla.py: loss above the original in nats, KL(original || factorised), agreement; processor
seconds and peak memory. What remains counts every number of the result: biases and orders of rows too.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import COMMAND, SMOLLM2, run, show
from benchmarks.mla import RESULTS, base, plain_checkpoint, scores, settings, where
from benchmarks.mla_windows import TEXTS, Windows, cut, fitting
from benchmarks.peers_low_rank import METHODS, apply, calibrate, decoder_linears
from compiler.evaluate import load_model

WHERE = {"role": "linear", "name": "*.layers.*"}
REPORTED = ["wikipedia", "persuasion", "brown_k"]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.job:
        print(json.dumps(do_job(json.loads(options.job))))
        return
    model = plain_checkpoint(options.model)
    windows = cut(model, options)
    original = base(model, windows, options)
    rows: list[dict[str, Any]] = []
    found = {"model": str(options.model), "settings": settings(options), "original": original, "methods": rows}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"low-rank-{options.name or time.strftime('%Y%m%d-%H%M%S')}.json"
    for seed in options.seeds:
        for method in options.only:
            made = ours(model, windows, seed, options) if method == "ours" else peers(method, windows, seed, options)
            rows.extend({"method": method, "seed": seed, **row} for row in made)
            path.write_text(json.dumps(found, indent=1))
    report(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=lambda text: Path(text).absolute(), default=SMOLLM2)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6], help="parts of the parameters that remain")
    parser.add_argument("--only", nargs="+", choices=[*METHODS, "ours"], default=[*METHODS, "ours"], metavar="METHOD")
    parser.add_argument("--ours", type=json.loads, action="append", help="options of low-rank, as JSON")
    parser.add_argument("--ours-length", type=int, default=512, help="tokens in a calibration window of ours")
    parser.add_argument("--texts", nargs="+", choices=[*TEXTS], default=REPORTED, metavar="TEXT")
    parser.add_argument("--windows", type=int, default=16, help="windows of each text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--calibration", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the file in benchmarks/results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_process(job: dict[str, Any], options: argparse.Namespace) -> Any:
    command = [sys.executable, __file__, "--threads", str(options.threads), "--job", json.dumps(job)]
    return json.loads(run(command, OMP_NUM_THREADS=str(options.threads)).output.splitlines()[-1])


def peers(method: str, windows: Windows, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    model = plain_checkpoint(options.model)
    job = {**where(model, windows), "calibration": windows.calibration[seed], "method": method, "keep": options.keep}
    return in_process(job, options)


def ours(model: Path, windows: Windows, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    wanted = [{"keep": keep, **own} for keep in options.keep for own in options.ours or [{}]]
    return [our_row(model, windows, setting, seed, options) for setting in wanted]


def our_row(
    model: Path, windows: Windows, setting: dict[str, Any], seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    length = options.ours_length
    text = windows.folder / f"{windows.calibration[seed]}.txt"
    samples = fitting(text, model, length, options.calibration * options.length // length, seed)
    recipe = {
        "model": str(model),
        "calibration": {"data": str(text), "samples": samples, "length": length, "seed": seed},
        "passes": [{"low-rank": {"where": WHERE, **setting}}],
        "emit": ["safetensors"],
    }
    out = windows.folder / f"low-rank-{options.name or 'latest'}"
    path = out.with_suffix(".json")
    path.write_text(json.dumps(recipe))
    shutil.rmtree(out, ignore_errors=True)
    done = run([*COMMAND, str(path), "-o", str(out), "--quiet"], OMP_NUM_THREADS=str(options.threads))
    job = {**where(out, windows), "method": "score", "original": str(model)}
    return {"setting": setting, "cpu_seconds": done.cpu_seconds, "peak_rss": done.peak_rss, **in_process(job, options)}


def do_job(job: dict[str, Any]) -> Any:
    """What a process of its own does: score a checkpoint, or factorise by a published method and score that."""
    texts = {name: Path(job["folder"]) / file for name, file in job["texts"].items()}
    model = load_model(job["model"], trust_remote_code=job["method"] == "score")
    if job["method"] == "score":
        before = load_model(job["original"])
        whole = sum(part.weight.numel() for part in decoder_linears(before).values())
        saved = numbers(before) - numbers(model)
        return {"kept": 1 - saved / whole, "class": type(model).__name__, "texts": scores(model, texts)}
    whole = {name: part.weight.clone() for name, part in decoder_linears(model).items()}
    sums = calibrate(model, torch.load(Path(job["folder"]) / f"{job['calibration']}.pt"))
    spent = time.process_time()
    rows: list[dict[str, Any]] = []
    for keep in job["keep"]:
        started = time.process_time()
        for name, part in decoder_linears(model).items():
            part.weight.data.copy_(whole[name])
        held = apply(model, sums, job["method"], keep)
        seconds = spent + time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        kept = held / sum(weight.numel() for weight in whole.values())
        rows.append({"setting": {"keep": keep}, "cpu_seconds": seconds, "peak_rss": peak, "kept": kept,
                     "texts": scores(model, texts)})  # fmt: skip
    return rows


def numbers(model: Any) -> int:
    """Every number that the checkpoint of ``model`` holds, tied ones once."""
    return sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())


def report(found: dict[str, Any]) -> None:
    texts = found["original"]["texts"]
    head = [
        "method",
        "setting",
        "kept",
        *(f"{name} +nats" for name in texts),
        *(f"{name} KL" for name in texts),
        "CPU s",
    ]
    rows = [head]
    for row in found["methods"]:
        above = [mean(row["texts"][name]["losses"]) - mean(texts[name]) for name in texts]
        kl = [row["texts"][name]["kl"] for name in texts]
        shown = ", ".join(f"{key} {value}" for key, value in row["setting"].items())
        rows.append([row["method"], shown, f"{row['kept']:.3f}", *(f"{x:.3f}" for x in (*above, *kl)),
                     f"{row['cpu_seconds']:.0f}"])  # fmt: skip
    show("Factorised decoder linears", rows)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
