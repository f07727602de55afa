"""Sparse decoders, ours and published ones, with as many zeros, on the same windows in one run.

``python benchmarks/sparsify.py --windows 8`` sets half of the elements of the linear maps of SmolLM2-135M's layers to
zero by every method, anywhere and 2 of each 4, and scores the results on texts that nothing was calibrated on.
Calibration: windows of Brown B to F; seed 0 takes the first ones. All methods of a run are calibrated on the same.

Ours is the real thing: the command runs a recipe with `sparsify`, transformers loads what it wrote. ``--ours`` takes
options of the pass as JSON, beside `where` and `keep`, and may be repeated; a `pattern` takes the place of `keep`.
``--only`` picks methods. Scores and costs are those of decoders.py; what remains counts elements that are not zero.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.decoders import LINEARS, Benchmark, Row, linear_numbers, linears
from benchmarks.peers_sparsify import PEERS


def entry(setting: Row) -> Row:
    given = {name: value for name, value in setting.items() if name != "keep" or "pattern" not in setting}
    return {"sparsify": {"where": LINEARS, **given}}


def not_zero(before: Any, after: Any) -> float:
    return sum(int(part.weight.count_nonzero()) for part in linears(after).values()) / linear_numbers(before)


BENCHMARK = Benchmark(
    name="sparsify",
    script=__file__,
    title="Sparse decoder linears",
    description=__doc__,
    peers=PEERS,
    entry=entry,
    ours=({}, {"metric": "input"}, {"sizes": "by-layer"}, {"pattern": "2:4"}),
    keep=(0.5,),
    kept=not_zero,
)

if __name__ == "__main__":
    BENCHMARK.main()
