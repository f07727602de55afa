"""Kernels compiled for GPUs that this machine lacks: they fit, spill nothing, and load as their design counts on."""

import importlib
import re
from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch

from backends.binaries.compile import SHARED, TARGETS, compiled
from backends.kernels import rms_norm, rms_norm_quantized, splits


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
    "bf16_codec": {"_bf16_codec": Gate(resident=4, vector=False)},
    "cached_decode": {"_cached_decode": Gate(matrix=True), "_combine": Gate(resident=8)},
    "codebook_linear": {"_codebook_linear": Gate(vector=False, matrix=True), "_added": Gate(resident=8)},
    "latent_decode": {"_latent_decode": Gate(asynchronous=True, matrix=True), "_combine": Gate(resident=8)},
    "low_rank_linear": {"_low_rank_linear": Gate(resident=2)},
    "packed_dense": {"_widened": Gate(resident=4)},
    "packed_linear": {
        "_matrix": Gate(vector=False, asynchronous=True, matrix=True),
        "_added": Gate(resident=8),
        "_widened": Gate(resident=4),
    },
    "packed_swiglu": {
        "_pair": Gate(vector=False, asynchronous=True, matrix=True),
        "_widened": Gate(resident=4),
        "_joined": Gate(resident=8),
    },
    "rms_norm": {"_rms_norm": Gate(resident=2)},
    "rms_norm_quantized": {"_rms_norm_quantized": Gate(resident=2)},
    "sparse_linear": {"_gathered": Gate(resident=4), "_widened": Gate(resident=4, vector=False)},
    "token_match": {"_match": Gate(matrix=True), "_rank": Gate(vector=False), "_place": Gate(vector=False)},
    "token_merge": {"_token_merge": Gate(resident=4)},
}
MOST = 3
"""Binaries of one kernel for one target: those of all cases differ in sizes of blocks."""
PATTERNS = {
    "sm": {
        "vector": r"ld\.global\S*\.v4\.|ld\.global\S*\.v8\.|cp\.async\S* \[.*\], \[.*\], (?:16|0x10)|cp\.async\.bulk",
        "asynchronous": r"cp\.async",
        "matrix": r"\bmma\.sync|wgmma\.mma|tcgen05\.mma",
    },
    # 8 bytes for each of 64 lanes are as many as 16 for each of 32.
    "gfx": {"vector": r"(?:global|buffer)_load_dwordx[24]", "matrix": r"v_mfma"},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("file", GATES)
def test_binaries_pass_their_gates(file, target):
    kernel = importlib.import_module(f"backends.kernels.{file}")
    cases = importlib.import_module(f"benchmarks.kernels.{file}").cases("meta")
    chosen = defaultdict(dict)
    for case in cases:
        assert kernel.outside(*case.inputs) is None
        for launch in kernel.plan(*case.inputs).compiled:
            chosen[launch.kernel.__name__].setdefault(str(launch.constants), (launch, case.name))
    assert set(chosen) == set(GATES[file])
    for several in chosen.values():
        for launch, name in _spread(list(several.values())):
            binary = compiled(launch, target)
            _check(binary, GATES[file][binary.name], name)


def _spread(found):
    """At most MOST of ``found``, from the first to the last."""
    return found[:: max(1, -(-len(found) // MOST))]


def _check(binary, gate, name):
    where = f"{binary.name} of {name} for {binary.target}"
    assert binary.spilled == 0, f"{where} spills {binary.spilled}"
    assert binary.shared <= SHARED[binary.target], f"{where} takes {binary.shared} bytes of shared memory"
    assert binary.resident >= gate.resident, f"{where}: {binary.registers} registers, {binary.shared} bytes shared"
    for feature, pattern in PATTERNS[re.match("[a-z]+", binary.target)[0]].items():
        if getattr(gate, feature):
            assert re.search(pattern, binary.assembly), f"{where} has no {feature} instruction"


def test_sizes_of_one_compile():
    """Triton makes a constant of an argument that is 1, which is no tensor in the kernel then."""
    one = torch.empty(1, 1, device="meta")
    launches = [
        *rms_norm.plan(one, None, one[0], 1e-5).launches,
        *rms_norm_quantized.plan(one, None, one[0], 1e-5).launches,
        *splits.added(torch.empty(2, 1, 1, device="meta"), one),
    ]
    assert all(compiled(launch, "sm_90").code for launch in launches)
