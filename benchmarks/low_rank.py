"""Factorised decoders, ours and published ones, of as many parameters, on the same windows in one run.

``python benchmarks/low_rank.py --keep 0.8 0.6 --windows 8`` factorises the linear maps of SmolLM2-135M's layers by
every method so that these parts of their parameters remain, and scores the results on texts that nothing was
calibrated on.
Calibration: windows of Brown B to F; seed 0 takes the first ones. All peers of a run are calibrated on the same.

Ours is the real thing: the command runs a recipe with `low-rank`, transformers loads the generated class that it wrote.
``--ours`` takes options of the pass as JSON, beside `where` and `keep`, and may be repeated; ``--only`` picks methods.
Scores and costs are those of decoders.py. What remains counts every number of the result: biases and orders of rows
too.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.decoders import LINEARS, Benchmark, Peer
from benchmarks.peers_low_rank import METHODS, apply, calibrate

BENCHMARK = Benchmark(
    name="low-rank",
    script=__file__,
    title="Factorised decoder linears",
    description=__doc__,
    peers={name: Peer(calibrate, partial(apply, method=name)) for name in METHODS},
    entry=lambda setting: {"low-rank": {"where": LINEARS, **setting}},
    ours=({},),
    keep=(0.8, 0.6),
)

if __name__ == "__main__":
    BENCHMARK.main()
