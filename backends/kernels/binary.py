"""Launches of kernels that were compiled beforehand, by the CUDA driver alone: without Triton and without a compiler.

A manifest, JSON, lists the binaries in folders beside it. Each was compiled for one target and one specialisation of a
kernel: types of its arguments, constants, and which arguments are divisible by 16. A launch is found by these, and its
arguments are handed over in the kernel's order, followed by null for the pointers that Triton adds to them.

What is read is checked first: the manifest by the digest in ``aot.py``, the kernel files and the binaries by those in
the manifest.
"""

# pyright: basic
from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .aot import MANIFEST

if TYPE_CHECKING:
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
FOR_ANY = "for_any"
"""The attribute of a kernel that names the arguments whose values it is not compiled for."""
LOG = logging.getLogger(__name__)


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
    """As Triton specialises: None and 1 are constants, too, and addresses may be divisible like numbers.

    Of the arguments that a kernel is compiled ``FOR_ANY`` values of, neither holds.
    """
    function = getattr(launch.kernel, "fn", launch.kernel)
    signature, constants, divisible = dict[str, str](), dict[str, Any](), list[str]()
    for name in _parameters(function):
        value = launch.constants[name] if name in launch.constants else launch.arguments[name]
        if name in getattr(function, FOR_ANY, ()):
            signature[name] = _type(value)
            continue
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


class DriverError(RuntimeError):
    """The driver of the GPU refused; the message is its own."""


class Cuda:
    """The driver of NVIDIA's GPUs. Raises OSError where there is none."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")

    @property
    def target(self) -> str:
        """What kernels for the current GPU are compiled for."""
        return "sm_{}{}".format(*torch.cuda.get_device_capability())

    @property
    def device(self) -> int:
        """The current GPU, which a loaded kernel belongs to."""
        return torch.cuda.current_device()

    def load(self, code: bytes, kernel: str, shared: int) -> Any:
        """The ``kernel`` of a binary, in the current context. Raises DriverError."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), code))
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), module, kernel.encode()))
        if shared > STATIC_SHARED:
            self._check(self._driver.cuFuncSetAttribute(function, ALLOW_SHARED, shared))
        return function

    def launch(self, function: Any, grid: tuple[int, ...], entry: dict[str, Any], parameters: Any) -> None:
        """Launches it on the current stream of torch. Raises DriverError."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        call = self._driver.cuLaunchCooperativeKernel if entry["cooperative"] else self._driver.cuLaunchKernel
        last = () if entry["cooperative"] else (None,)
        shape = (*[*grid, 1, 1][:3], entry["warps"] * WARP, 1, 1)
        self._check(call(function, *shape, entry["shared"], stream, parameters, *last))

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise DriverError(f"CUDA driver: {(text.value or b'unknown error').decode()}")


class Binaries:
    """The binaries of a manifest whose SHA-256 is ``digest``; "": none. Found and loaded when they are first launched.

    A launch that has none is left to Triton, and the log says so once, as a warning. Raises RuntimeError for a file
    that is not the one that was written.
    """

    def __init__(self, digest: str, driver: Callable[[], Any] = Cuda) -> None:
        self._digest, self._open = digest, driver
        self._find: Callable[[str], str | None] | None = None
        self._driver: Any = None
        self._entries: dict[tuple[str, str], dict[str, Any]] | None = None
        self._functions: dict[tuple[int, str], Any] = {}

    def lie(self, find: Callable[[str], str | None]) -> None:
        """Says where: ``find`` gives the path of a file by its name in the manifest's folder, None where it is not."""
        self._find, self._entries = find, None

    def has(self, launch: Launch) -> bool:
        """Whether there is a binary of it for the current GPU, which is loaded."""
        return not all(launch.grid) or self._loaded(launch) is not None

    def run(self, launch: Launch) -> bool:
        """Launches it on the current stream; False, and nothing is done, when it was not compiled beforehand."""
        found = self._loaded(launch)
        if found is None:
            return False
        entry, function = found
        values = [_value(kind, launch.arguments[name]) for name, kind in _passed(entry["signature"])]
        values += [ctypes.c_void_p(None)] * entry["hidden"]
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self._driver.launch(function, launch.grid, entry, parameters)
        return True

    def _loaded(self, launch: Launch) -> tuple[dict[str, Any], Any] | None:
        """The entry of the manifest, and the kernel."""
        if not self._digest or self._find is None:
            return None
        if self._entries is None:
            self._entries = self._read(self._find)
        if not self._entries:
            return None
        found = specialised(launch)
        entry = self._entries.get((self._driver.target, found.key))
        place = (self._driver.device, found.key)
        if place not in self._functions:
            self._functions[place] = entry and self._load(entry, self._find)
            _say(found, self._driver.target, self._functions[place] is not None)
        function = self._functions[place]
        return None if entry is None or function is None else (entry, function)

    def _read(self, find: Callable[[str], str | None]) -> dict[tuple[str, str], dict[str, Any]]:
        """The entries of the manifest by target and key; none, with a warning, where they are of no use."""
        path = find("manifest.json")
        if path is None:
            LOG.warning("the checkpoint's binaries are not beside it: Triton compiles the kernels")
            return {}
        manifest = json.loads(_checked(Path(path), self._digest))
        changed = [name for name, digest in manifest["sources"].items() if sha256(_source(name)) != digest]
        if changed:
            LOG.warning("%s was changed after the binaries were made: Triton compiles the kernels", changed[0])
            return {}
        if torch.version.hip:
            LOG.warning("there is no loader of binaries for AMD's GPUs: Triton compiles the kernels")
            return {}
        try:
            self._driver = self._open()
        except OSError as reason:
            LOG.warning("no CUDA driver (%s): Triton compiles the kernels", reason)
            return {}
        return {(entry["target"], entry["key"]): entry for entry in manifest["binaries"]}

    def _load(self, entry: dict[str, Any], find: Callable[[str], str | None]) -> Any:
        path = find(entry["file"])
        if path is None:
            return None
        code = _checked(Path(path), entry["digest"])
        try:
            return self._driver.load(code, entry["kernel"], entry["shared"])
        except DriverError as reason:
            LOG.warning("%s: %s", entry["file"], reason)
            return None


def _say(found: Specialisation, target: str, loaded: bool) -> None:
    name = f"{found.kernel.strip('_')}-{found.key} for {target}"
    if loaded:
        LOG.info("%s: the checkpoint's binary", name)
    else:
        LOG.warning("%s: there is no binary, Triton compiles it", name)


def _checked(path: Path, digest: str) -> bytes:
    content = path.read_bytes()
    if sha256(content) != digest:
        raise RuntimeError(f"{path} is not the file that the checkpoint was written with")
    return content


def sha256(content: bytes) -> str:
    """Its digest, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _source(name: str) -> bytes:
    file = Path(__file__).with_name(name)
    return file.read_bytes() if file.exists() else b""


def _passed(signature: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, kind) for name, kind in signature.items() if kind != "constexpr"]


def _value(kind: str, value: Any) -> Any:
    return ctypes.c_void_p(value.data_ptr()) if kind.startswith("*") else NUMBERS[kind](value)


BINARIES = Binaries(MANIFEST)
"""Those of the checkpoint that these files are part of, whose code says where they lie."""
