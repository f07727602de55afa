"""Pruned decoders, ours and published ones, of as many parameters, on the same windows in one run.

``python benchmarks/prune.py --keep 0.8 0.75 --windows 8`` prunes SmolLM2-135M by every method so that these parts of
the parameters of its layers' linear maps remain, and scores the results on texts that nothing was calibrated on.
Calibration: windows of Brown B to F; seed 0 takes the first ones. All methods of a run are calibrated on the same.

Ours is the real thing: the command runs a recipe with `prune`, transformers loads what it wrote. ``--ours`` takes
options of the pass as JSON, beside `keep`, `written`, the samples that the model writes itself to be calibrated on
as well, and `then`, a list of passes that follow; it may be repeated. ``--only`` picks methods; the files of
peers_prune say how the published ones are applied. Scores and costs are those of decoders.py. What remains counts
every number of the result: new biases, shortcut matrices and a head that is no longer tied too.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.decoders import Benchmark
from benchmarks.peers_prune import PEERS

BENCHMARK = Benchmark(
    name="prune",
    script=__file__,
    title="Pruned decoders",
    description=__doc__,
    peers=PEERS,
    entry=lambda setting: {"prune": setting},
    ours=({}, {"sizes": "by-layer"}, {"sizes": "by-layer", "written": 32}),
    keep=(0.8, 0.75),
)

if __name__ == "__main__":
    BENCHMARK.main()
