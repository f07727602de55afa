"""Launches compiled without their GPU, and what the binaries need of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.kernels.binary import ALIGNED, Specialisation, specialised
from backends.kernels.launch import Launch
from compiler.errors import TargetError, first_line

# Shared memory that one program may take, in bytes: CUDA C++ Programming Guide, table of compute capabilities; CDNA3
# instruction set reference, local data share.
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TARGETS = tuple(SHARED)
PROCESSORS = {"sm_80": (108, 56), "sm_86": (84, 82, 72), "sm_90": (132, 114), "sm_100": (148,), "gfx942": (304,)}
"""Multiprocessors of the GPUs of each target, on which splits depend: A100, A30; A40, RTX 3090, A10; H100 and H200,
H100 PCIe; B200; MI300X. Source: the vendors' data sheets."""
REGISTERS = 65536  # of a multiprocessor of NVIDIA, 32 bits each
AMD_REGISTERS, AMD_UNITS = 512, 4  # vector registers of a lane, and SIMD units of a compute unit


@dataclass(frozen=True)
class Binary:
    """A kernel for one target. Sizes in bytes; ``registers`` of a thread; ``assembly`` is its PTX or AMD GCN text.

    ``hidden`` pointers follow the arguments: to memory that Triton's runtime would allocate, here none.
    """

    target: str
    name: str
    code: bytes
    assembly: str
    warps: int
    shared: int
    registers: int
    spilled: int
    hidden: int
    specialisation: Specialisation

    @property
    def resident(self) -> int:
        """How many programs fit on a multiprocessor at once, as registers and shared memory allow."""
        each = max(self.registers, 1)
        nvidia = self.target.startswith("sm_")
        by_registers = (
            REGISTERS // (each * self.warps * 32) if nvidia else AMD_REGISTERS // each * AMD_UNITS // self.warps
        )
        return min(by_registers, SHARED[self.target] // max(self.shared, 1))


def compiled(launch: Launch, target: str) -> Binary:
    """``launch`` for ``target``, one of TARGETS, specialised as Triton would specialise it for these arguments.

    Reads sizes and types of its tensors, never their data. The bytes are the same wherever the source lies. Raises
    TargetError when Triton, or a tool that comes with it, does not compile the kernel or is not there.
    """
    from triton.compiler import CompilationError
    from triton.errors import TritonError

    try:
        return _compiled(launch, target)
    except (TritonError, RuntimeError, FileNotFoundError, subprocess.CalledProcessError) as reason:
        said = reason.error_message if isinstance(reason, CompilationError) else None
        raise TargetError(
            f"Triton makes no binary for {target}: {said or first_line(reason)}",
            where=f"kernel {launch.kernel.__name__}",
            remedy=f"leave {target} out of `binaries`, or install the Triton that constraints.txt names",
        ) from reason


def _compiled(launch: Launch, target: str) -> Binary:
    import triton
    from triton import knobs
    from triton.compiler import ASTSource

    found = specialised(launch)
    places = [place for place, name in enumerate(found.signature) if name in found.divisible]
    attributes = {(place,): [["tt.divisibility", ALIGNED]] for place in places}
    source = ASTSource(fn=launch.kernel, signature=found.signature, constexprs=found.constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    options |= _options(launch, target)
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        made = triton.compile(source, target=_gpu(target), options=options)
    kind = "cubin" if target.startswith("sm_") else "hsaco"
    code, text = made.asm[kind], made.asm["ptx" if kind == "cubin" else "amdgcn"]
    registers, spilled = _cuda_resources(code) if kind == "cubin" else _amd_resources(text)
    shared, name = made.metadata.shared, made.metadata.name
    return Binary(target, name, code, text, launch.warps, shared, registers, spilled, _hidden(text, found), found)


def _options(launch: Launch, target: str) -> dict[str, Any]:
    """A cooperative grid is a launch attribute of CUDA; elsewhere Triton has no such option."""
    return launch.options if target.startswith("sm_") else {}


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)


def _hidden(text: str, found: Specialisation) -> int:
    """Parameters of the compiled kernel that it has beyond those of ``found``."""
    parameters = len(re.findall(r"^\s*\.param|\.value_kind:\s+(?:global_buffer|by_value)", text, re.MULTILINE))
    return parameters - sum(kind != "constexpr" for kind in found.signature.values())


def _cuda_resources(code: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        tool = Path(knobs.nvidia.cuobjdump.path)
        printed = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed.stdout)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_resources(text: str) -> tuple[int, int]:
    """Scalar registers that are spilled go to lanes of vector registers, which are counted, and not to memory."""
    found = {key: int(number) for key, number in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
    return found["vgpr_count"], found["vgpr_spill_count"]
