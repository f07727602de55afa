"""Kernels as a folder beside a checkpoint: in the layout of Hugging Face's ``kernels``, and compiled.

    build/torch-cpu, torch-cuda, torch-rocm/   the kernel files as a package of Python, and metadata.json
    aot/manifest.json                          what was compiled: for which target, types, constants, with which needs
    aot/<target>/<kernel>-<key>.cubin|.hsaco   a binary for each specialisation of each kernel

``kernels.get_local_kernel(folder)`` loads the first; ``backends.kernels.binary`` launches the last.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from backends.binaries.compile import TARGETS, Binary, compiled
from backends.kernels.binary import specialised
from backends.kernels.launch import Launch

SOURCES = Path(__file__).parent.parent / "kernels"
BACKENDS = ("cpu", "cuda", "rocm")
LICENSE = "Apache-2.0"


def write_package(
    folder: Path, name: str, kernels: Iterable[str], launches: Iterable[Launch] = (), targets: Iterable[str] = TARGETS
) -> None:
    """Writes the files of ``kernels`` and of what they import, named as their operations, and compiles ``launches``.

    ``name`` is the package's, in lower case with dashes. Launches that one binary serves are compiled once. Raises
    Triton's CompilationError.
    """
    exported = sorted(kernels)
    unique = {specialised(launch).key: launch for launch in launches}
    shipped = with_imports([*exported, "binary"] if unique else exported)
    files = {f"{file}.py": (SOURCES / f"{file}.py").read_bytes() for file in shipped}
    files["__init__.py"] = _exports(exported).encode()
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        variant.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (variant / file).write_bytes(content)
        _write_json(variant / "metadata.json", _metadata(name, backend, files))
    if unique:
        _write_binaries(folder / "aot", unique, targets)


def with_imports(kernels: Iterable[str]) -> list[str]:
    """``kernels`` and the files beside them that they import, directly or not."""
    found, todo = set[str](), list(kernels)
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += _siblings((SOURCES / f"{file}.py").read_text())
    return sorted(found)


def _siblings(source: str) -> Iterable[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def _exports(kernels: list[str]) -> str:
    imports = "".join(f"from .{file} import {file}\n" for file in kernels)
    return f"{imports}\n__all__ = {json.dumps(kernels)}\n"


def _metadata(name: str, backend: str, files: dict[str, bytes]) -> dict[str, Any]:
    """The digests are of all other files of the variant; the id is unique to its content."""
    digests = {file: hashlib.sha256(content).digest() for file, content in sorted(files.items())}
    content = hashlib.sha256(b"".join(digests.values())).hexdigest()
    return {
        "id": f"_{name.replace('-', '_')}_{backend}_{content[:12]}",
        "name": name,
        "version": 1,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {file: base64.b64encode(digest).decode() for file, digest in digests.items()},
        },
    }


def _write_binaries(folder: Path, unique: dict[str, Launch], targets: Iterable[str]) -> None:
    entries = list[dict[str, Any]]()
    for target in targets:
        (folder / target).mkdir(parents=True, exist_ok=True)
        for key, launch in unique.items():
            binary = compiled(launch, target)
            file = f"{target}/{binary.name.strip('_')}-{key}.{'cubin' if target.startswith('sm_') else 'hsaco'}"
            (folder / file).write_bytes(binary.code)
            entries.append(_entry(file, binary))
    _write_json(folder / "manifest.json", {"binaries": entries})


def _entry(file: str, binary: Binary) -> dict[str, Any]:
    found = binary.specialisation
    return {
        "key": found.key,
        "kernel": binary.name,
        "target": binary.target,
        "file": file,
        "digest": hashlib.sha256(binary.code).hexdigest(),
        "signature": found.signature,
        "constants": found.constants,
        "divisible": found.divisible,
        "warps": binary.warps,
        "shared": binary.shared,
        "registers": binary.registers,
        "hidden": binary.hidden,
        "cooperative": bool(found.options.get("launch_cooperative_grid")),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")
