"""Launches compiled without their GPU, and what the binaries need of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.kernels.launch import Launch

# Shared memory that one program may take, in bytes: CUDA C++ Programming Guide, table of compute capabilities; CDNA3
# instruction set reference, local data share.
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TARGETS = tuple(SHARED)
REGISTERS = 65536  # of a multiprocessor of NVIDIA, 32 bits each
AMD_REGISTERS, AMD_UNITS = 512, 4  # vector registers of a lane, and SIMD units of a compute unit
ALIGNED = 16
NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Binary:
    """A kernel for one target. Sizes in bytes; ``registers`` of a thread; ``assembly`` is its PTX or AMD GCN text."""

    target: str
    name: str
    code: bytes
    assembly: str
    warps: int
    shared: int
    registers: int
    spilled: int
    signature: Mapping[str, str]
    constants: Mapping[str, Any]

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

    Reads sizes and types of its tensors, never their data. Raises Triton's CompilationError.
    """
    import triton
    from triton.compiler import ASTSource

    signature, constants, divisible = _specialised(launch)
    attributes = {(place,): [["tt.divisibility", ALIGNED]] for place in divisible}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    options |= _options(launch, target)
    made = triton.compile(source, target=_gpu(target), options=options)
    kind = "cubin" if target.startswith("sm_") else "hsaco"
    code, text = made.asm[kind], made.asm["ptx" if kind == "cubin" else "amdgcn"]
    registers, spilled = _cuda_resources(code) if kind == "cubin" else _amd_resources(text)
    shared, name = made.metadata.shared, made.metadata.name
    return Binary(target, name, code, text, launch.warps, shared, registers, spilled, signature, constants)


def _options(launch: Launch, target: str) -> dict[str, Any]:
    """A cooperative grid is a launch attribute of CUDA; elsewhere Triton has no such option."""
    return launch.options if target.startswith("sm_") else {}


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    signature, constants, divisible = dict[str, str](), dict[str, Any](), list[int]()
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.constants[name] if name in launch.constants else launch.arguments[name]
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % ALIGNED == 0):
            divisible.append(place)
    return signature, constants, divisible


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


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
