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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from backends.binaries.compile import Binary, compiled
from backends.kernels.binary import sha256, specialised
from backends.kernels.launch import Launch

SOURCES = Path(__file__).parent.parent / "kernels"
BACKENDS = ("cpu", "cuda", "rocm")
LICENSE = "Apache-2.0"
NAMES_MANIFEST = "aot.py"
"""The file that differs between checkpoints: it has the digest of their manifest."""


Progress = Callable[[int, int], None]
"""Is told how many binaries are written, and of how many."""

Unique = Mapping[str, Mapping[str, Launch]]
"""Launches by target, then by the keys of their specialisations."""


def unique(launches: Iterable[Launch]) -> dict[str, Launch]:
    """Of ``launches`` one for each binary, by its key."""
    return {specialised(launch).key: launch for launch in launches}


def write_package(
    folder: Path,
    name: str,
    kernels: Iterable[str],
    launches: Unique | None = None,
    on_progress: Progress | None = None,
) -> str:
    """Writes the files of ``kernels`` and of what they import, named as their operations, and compiles ``launches``.

    ``name`` is the package's, in lower case with dashes. Gives the digest of the manifest of what was compiled; "" when
    nothing was. Raises TargetError when a launch does not compile.
    """
    exported = sorted(kernels)
    files = {f"{file}.py": (SOURCES / f"{file}.py").read_bytes() for file in with_imports(exported)}
    sources = {file: sha256(content) for file, content in sorted(files.items()) if file != NAMES_MANIFEST}
    files["__init__.py"] = _exports(exported).encode()
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        variant.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (variant / file).write_bytes(content)
        _write_json(variant / "metadata.json", _metadata(name, backend, files))
    if not launches:
        return ""
    entries = list(_written(folder / "aot", launches, on_progress))
    manifest = folder / "aot" / "manifest.json"
    _write_json(manifest, {"sources": sources, "binaries": entries})
    return sha256(manifest.read_bytes())


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


def _written(folder: Path, launches: Unique, on_progress: Progress | None) -> Iterator[dict[str, Any]]:
    total, done = sum(map(len, launches.values())), 0
    for target, found in launches.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for key, launch in sorted(found.items()):
            binary = compiled(launch, target)
            file = f"{target}/{binary.name.strip('_')}-{key}.{'cubin' if target.startswith('sm_') else 'hsaco'}"
            (folder / file).write_bytes(binary.code)
            done += 1
            if on_progress is not None:
                on_progress(done, total)
            yield _entry(file, binary)


def _entry(file: str, binary: Binary) -> dict[str, Any]:
    found = binary.specialisation
    return {
        "key": found.key,
        "kernel": binary.name,
        "target": binary.target,
        "file": file,
        "digest": sha256(binary.code),
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
