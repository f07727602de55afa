"""Encoders with weights of few bits, ours and published, measured by what comes out and by what it is used for.

``python benchmarks/quantize_encoders.py minilm dinov2 whisper --bits 4 3 2`` rounds the linear maps of the layers of
all-MiniLM-L6-v2, DINOv2-small and Whisper tiny.en, whose weights lie on no grid, in groups of 64 inputs. Models, data
and scores are those of encoders.py; `error` is ‖y - y₀‖ / ‖y₀‖ of the output y and the original's y₀ over all held-out
data. ``--ours`` takes options of `quantize` as JSON, beside `bits`, and may be repeated.

Published, symmetric, reimplemented as peers_quantize says: `nearest`, and `gptq` as llm-compressor runs it where it
knows no layers to go by: second moments from one pass through the original. A group costs a scale, and with
``symmetric: false`` of ours as many bits more as a code has.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from pydantic import TypeAdapter

from benchmarks.encoders import LINEARS, TASKS, Made, Task, compute, error, measure, ours, parser_of
from benchmarks.peers_low_rank import sums_of
from benchmarks.peers_prune import blocks
from benchmarks.peers_quantize import GROUP, rounded, solved, unclipped
from passes import Quantize

PEERS = ("nearest", "gptq")
DEFAULT = [{"method": "nearest"}, {"method": "gptq"}, {"method": "refined"}, {"method": "refined", "symmetric": False}]


@torch.inference_mode()
def peer(task: Task, method: str, bits: int) -> Made:
    started = time.process_time()
    model = copy.deepcopy(task.model)
    call = compute(model, task.output)
    named = blocks.linears_of(task.blocks(model))

    def forward() -> None:
        for inputs in task.calibration:
            call(inputs)

    sums = sums_of(named, forward) if method == "gptq" else {}
    for name, part in named.items():
        weight = part.weight.data
        if method == "gptq":
            part.weight.data = solved(weight, sums[name][0].float(), bits, unclipped)
        else:
            groups = weight.unflatten(1, (-1, GROUP))
            part.weight.data = rounded(groups, unclipped(groups, bits)[..., None], bits).flatten(1)
    return Made(call, 0, time.process_time() - started)


def made_all(task: Task, options: argparse.Namespace) -> Iterator[tuple[int, str, Made]]:
    for bits in options.bits:
        for method in PEERS if options.peers else ():
            yield bits, method, peer(task, method, bits)
        for own in options.ours or DEFAULT:
            given = {"where": LINEARS, "group": GROUP, "bits": bits, **own}
            shown = ", ".join(f"{key} {value}" for key, value in own.items())
            yield bits, f"ours: {shown}", ours(task, [TypeAdapter(Quantize).validate_python(given)])


def rows(task: Task, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    original = [compute(task.model, task.output)(inputs) for inputs in task.held_out]
    for bits, method, made in made_all(task, options):
        outputs = [made.compute(inputs) for inputs in task.held_out]
        row = {"bits": bits, "method": method, "error": error(original, outputs), "CPU s": made.seconds}
        yield {**row, **task.score(original, outputs)}


def main() -> None:
    parser = parser_of(str(__doc__), TASKS)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--ours", type=json.loads, action="append", help='such as {"method": "refined"}')
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--samples", type=int, default=64, help="pictures or clips to calibrate on, sentences by four")
    parser.add_argument("--score", type=int, default=100, help="half as many as pictures asked about, or sentences")
    options = parser.parse_args()
    measure("quantize-encoders", options, lambda name: rows(TASKS[name](options), options), digits=3)


if __name__ == "__main__":
    main()
