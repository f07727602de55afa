"""Quality against size of one checkpoint of blocks, read as far as each size allows, on the windows of decoders.py.

``python benchmarks/any_size.py --windows 4 --texts brown_a northanger`` writes SmolLM2-135M with the linear maps of its
layers as blocks, once, and loads it with transformers at several sizes, ``--bits`` a number of these maps. ``kept`` are
the bytes of the tensors that are in memory then, blocks and all others, over those of the original.
``--ours`` takes options of the pass as JSON; each is another checkpoint. Calibration: windows of Brown B to F.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoModelForCausalLM

from benchmarks.common import COMMAND, ROOT, SMOLLM2, run
from benchmarks.decoders import LINEARS, REPORTED, Row, linear_numbers, report
from benchmarks.mla import RESULTS, base, plain_checkpoint, scores, settings, where
from benchmarks.mla_windows import TEXTS, Windows, cut, fitting
from compiler.evaluate import load_model


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.job:
        print(json.dumps(scored(json.loads(options.job))))
        return
    model = plain_checkpoint(options.model)
    windows = cut(model, options)
    found = {"model": str(options.model), "settings": settings(options), "original": base(model, windows, options)}
    rows = [row for own in options.ours or [{}] for row in measured(model, windows, own, options)]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"any-size-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({**found, "methods": rows}, indent=1))
    report("One checkpoint at several sizes", {**found, "methods": rows})
    print(f"\n{path.relative_to(ROOT)}")


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model", type=lambda text: Path(text).absolute(), default=SMOLLM2)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 2.5, 3.0, 4.0])
    parser.add_argument("--ours", type=json.loads, action="append", help="options of the pass as JSON")
    parser.add_argument("--texts", nargs="+", choices=[*TEXTS], default=REPORTED, metavar="TEXT")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--calibration", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args(namespace=argparse.Namespace(seeds=[0]))


def measured(model: Path, windows: Windows, own: Row, options: argparse.Namespace) -> list[Row]:
    """A row for each size of the checkpoint that the pass makes with options ``own``."""
    text, length = windows.folder / f"{windows.calibration[0]}.txt", options.length
    samples = fitting(text, model, length, options.calibration, 0)
    out = windows.folder / "any-size"
    shutil.rmtree(out, ignore_errors=True)
    recipe = {
        "model": str(model),
        "calibration": {"data": str(text), "samples": samples, "length": length},
        "passes": [{"any-size": {"where": LINEARS, **own}}],
        "emit": ["safetensors"],
    }
    out.with_suffix(".json").write_text(json.dumps(recipe))
    threads = str(options.threads)
    command = [*COMMAND, str(out.with_suffix(".json")), "-o", str(out), "--quiet"]
    done = run(command, OMP_NUM_THREADS=threads)
    job = {**where(out, windows), "original": str(model), "bits": options.bits}
    command = [sys.executable, __file__, "--threads", threads, "--job", json.dumps(job)]
    found = json.loads(run(command, OMP_NUM_THREADS=threads).output.splitlines()[-1])
    costs = {"cpu_seconds": done.cpu_seconds, "peak_rss": done.peak_rss}
    return [{"method": "any-size", "seed": 0, **costs, **row, "setting": {**own, **row["setting"]}} for row in found]


def scored(job: Row) -> list[Row]:
    """The checkpoint at each size, scored in this process."""
    texts = {name: Path(job["folder"]) / file for name, file in job["texts"].items()}
    original = load_model(job["original"])
    numbers, whole = linear_numbers(original), held(original)
    stack = json.loads((Path(job["model"]) / "config.json").read_text())["stack"]
    rows: list[Row] = []
    for bits in job["bits"]:
        memory = stack["others"] + int(bits * numbers / 8)
        options: Row = {"trust_remote_code": True, "dtype": torch.float32, "memory": memory}
        model = AutoModelForCausalLM.from_pretrained(job["model"], **options).eval()
        rows.append({"setting": {"bits": bits}, "kept": held(model) / whole, "texts": scores(model, texts)})
    return rows


def held(model: Any) -> int:
    """The bytes of the tensors of ``model``, tied ones once."""
    return sum(tensor.nbytes for tensor in model.parameters())


if __name__ == "__main__":
    main()
