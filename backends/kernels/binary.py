"""Launches of kernels that were compiled beforehand, by the CUDA driver alone: without Triton and without a compiler.

A manifest, JSON, lists the binaries in folders beside it. Each was compiled for one target and one specialisation of a
kernel: types of its arguments, constants, and which arguments are divisible by 16. A launch is found by these, and its
arguments are handed over in the kernel's order, followed by null for the pointers that Triton adds to them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Launch

ALIGNED = 16
WARP = 32
STATIC_SHARED = 48 << 10  # bytes of shared memory that a kernel may take without being allowed more
ALLOW_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
TYPES = {
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
NUMBERS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class Specialisation(NamedTuple):
    """What a launch is compiled for: the type of each argument, "constexpr" for ``constants``, and those divisible."""

    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: list[str]
    warps: int
    stages: int
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """The name of this specialisation in a manifest."""
        return hashlib.sha256(json.dumps(self, sort_keys=True, default=str).encode()).hexdigest()[:16]


def specialised(launch: Launch) -> Specialisation:
    """As Triton specialises: None and 1 are constants, too, and addresses may be divisible like numbers."""
    function = getattr(launch.kernel, "fn", launch.kernel)
    signature, constants, divisible = dict[str, str](), dict[str, Any](), list[str]()
    for name in _parameters(function):
        value = launch.constants[name] if name in launch.constants else launch.arguments[name]
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if isinstance(number, int) and number % ALIGNED == 0:
            divisible.append(name)
    shape = (launch.warps, launch.stages, launch.options)
    return Specialisation(function.__name__, signature, constants, divisible, *shape)


@functools.cache
def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


class Binaries:
    """The binaries of ``folder`` that fit the current GPU.

    Raises OSError without a CUDA driver, and RuntimeError when the driver refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._driver = ctypes.CDLL("libcuda.so.1")
        major, minor = torch.cuda.get_device_capability()
        entries = json.loads((folder / "manifest.json").read_text())["binaries"]
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._entries = {entry["key"]: entry for entry in entries if entry["target"] == f"sm_{major}{minor}"}

    def run(self, launch: Launch) -> bool:
        """Launches it on the current stream; False, and nothing is done, when it was not compiled beforehand."""
        entry = self._entries.get(specialised(launch).key)
        if entry is None or not all(launch.grid):
            return entry is not None
        values = [_value(kind, launch.arguments[name]) for name, kind in _passed(entry["signature"])]
        values += [ctypes.c_void_p(None)] * entry["hidden"]
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid = [*launch.grid, 1, 1][:3]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        call = self._driver.cuLaunchCooperativeKernel if entry["cooperative"] else self._driver.cuLaunchKernel
        last = () if entry["cooperative"] else (None,)
        block = (entry["warps"] * WARP, 1, 1)
        self._check(call(self._function(entry), *grid, *block, entry["shared"], stream, parameters, *last))
        return True

    def _function(self, entry: dict[str, Any]) -> ctypes.c_void_p:
        if entry["key"] not in self._functions:
            self._functions[entry["key"]] = self._loaded(entry)
        return self._functions[entry["key"]]

    def _loaded(self, entry: dict[str, Any]) -> ctypes.c_void_p:
        """The kernel, its file checked, in the current context."""
        code = (self._folder / entry["file"]).read_bytes()
        if hashlib.sha256(code).hexdigest() != entry["digest"]:
            raise RuntimeError(f"{entry['file']} is not the file that the manifest lists")
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), code))
        name = entry["kernel"].encode()
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), module, name))
        if entry["shared"] > STATIC_SHARED:
            self._check(self._driver.cuFuncSetAttribute(function, ALLOW_SHARED, entry["shared"]))
        return function

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()}")


def _passed(signature: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, kind) for name, kind in signature.items() if kind != "constexpr"]


def _value(kind: str, value: Any) -> Any:
    return ctypes.c_void_p(value.data_ptr()) if kind.startswith("*") else NUMBERS[kind](value)
