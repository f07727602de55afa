"""Kernels compiled for GPUs that this machine lacks: they fit, spill nothing, and load as their design counts on."""

import importlib
import re
from dataclasses import dataclass

import pytest

from backends.binaries.compile import SHARED, TARGETS, compiled


@dataclass(frozen=True)
class Gate:
    """``resident`` programs at least fit on a multiprocessor; ``vector``: 16-byte loads; ``asynchronous`` copies to
    shared memory; ``matrix`` units."""

    resident: int = 1
    vector: bool = True
    asynchronous: bool = False
    matrix: bool = False


# By file, then by kernel in it.
GATES = {
    "rms_norm": {"_rms_norm": Gate(resident=2)},
}
PATTERNS = {
    "sm": {
        "vector": r"ld\.global\S*\.v4\.|ld\.global\S*\.v8\.|cp\.async\S* \[.*\], \[.*\], (?:16|0x10)|cp\.async\.bulk",
        "asynchronous": r"cp\.async",
        "matrix": r"\bmma\.sync|wgmma\.mma|tcgen05\.mma",
    },
    "gfx": {"vector": r"(?:global|buffer)_load_dwordx4", "matrix": r"v_mfma"},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("file", GATES)
def test_binaries_pass_their_gates(file, target):
    kernel = importlib.import_module(f"backends.kernels.{file}")
    cases = importlib.import_module(f"benchmarks.kernels.{file}").cases("meta")
    seen = set()
    for case in cases:
        assert kernel.outside(*case.inputs) is None
        for launch in kernel.plan(*case.inputs).launches:
            binary = compiled(launch, target)
            seen.add(binary.name)
            _check(binary, GATES[file][binary.name], case.name)
    assert seen == set(GATES[file])


def _check(binary, gate, name):
    where = f"{binary.name} of {name} for {binary.target}"
    assert binary.spilled == 0, f"{where} spills {binary.spilled}"
    assert binary.shared <= SHARED[binary.target], f"{where} takes {binary.shared} bytes of shared memory"
    assert binary.resident >= gate.resident, f"{where}: {binary.registers} registers, {binary.shared} bytes shared"
    for feature, pattern in PATTERNS[re.match("[a-z]+", binary.target)[0]].items():
        if getattr(gate, feature):
            assert re.search(pattern, binary.assembly), f"{where} has no {feature} instruction"
