"""Quantised decoders, ours and published ones, of as many bits a weight, on the same windows in one run.

``python benchmarks/quantize.py --windows 8`` quantises the linear maps of SmolLM2-135M's layers to 4, 3 and 2 bits by
every method, in groups of 64 inputs, and scores the results on texts that nothing was calibrated on; ``kept`` is what
remains of 32 bits a weight, scales and zero points counted. Calibration: windows of Brown B to F; seed 0 takes the
first ones. All methods of a run are calibrated on the same. ``--keep`` are the bits.

The checkpoint comes from a file of 4 bits: its weights lie on a grid of 16 values in each 32 inputs. Methods at 4 bits
meet that grid in part, so 3 and 2 bits are what tells them apart.

Ours is the real thing: the command runs a recipe with `quantize`, transformers loads what it wrote. ``--ours`` takes
options of the pass as JSON, beside `where`, `group` and `bits`, and may be repeated. ``--only`` picks methods. Scores
and costs are those of decoders.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Finished, weight_bytes
from benchmarks.decoders import LINEARS, Benchmark, Outside, Row, linear_numbers
from benchmarks.peers_quantize import FLOAT, GROUP, PEERS
from benchmarks.peers_quantize.outside import Job
from benchmarks.peers_quantize.packages import PACKAGES, Package


def entry(setting: Row) -> Row:
    bits = setting["keep"]
    given = {name: value for name, value in setting.items() if name != "keep"}
    return {"quantize": {"where": LINEARS, "group": GROUP, "bits": int(bits) if bits == int(bits) else bits, **given}}


def packaged(package: Package) -> Outside:
    """``package`` as a method of the benchmark, with symmetric codes and with zero points."""

    def settings(bits: float) -> list[Row]:
        return [{"bits": int(bits), "symmetric": symmetric} for symmetric in package.symmetric]

    def make(model: Path, windows: Path, setting: Row, out: Path, threads: int) -> tuple[float, Finished]:
        job = Job(str(model), str(windows), str(out), package.method, group=GROUP, threads=threads, **setting)
        bits, done = package.run(job)
        return bits / FLOAT, done

    return Outside(settings, make)


def of_bytes(before: Any, after: Any) -> float:
    """The part of the layers' bytes that remains."""
    whole = linear_numbers(before) * FLOAT // 8
    smaller = weight_bytes(Path(before.name_or_path)) - weight_bytes(Path(after.name_or_path))
    return 1 - smaller / whole


BENCHMARK = Benchmark(
    name="quantize",
    script=__file__,
    title="Quantised decoder linears",
    description=__doc__,
    peers=PEERS,
    entry=entry,
    ours=(
        {"method": "nearest"},
        {"method": "gptq"},
        {"method": "refined"},
        {"method": "refined", "symmetric": False},
    ),
    keep=(4, 3, 2),
    kept=of_bytes,
    outside={name: packaged(package) for name, package in PACKAGES.items()},
)

if __name__ == "__main__":
    BENCHMARK.main()
