"""Who may import whom, read off the source; and that the command starts without the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("compiler", "passes", "backends", "recipes")

# The longest prefix of a module decides. compiler.errors is open to all, and so is a module's own package.
ALLOWED = {
    "compiler.ir": (),
    "compiler.ir.execute": ("compiler.weights.evaluate",),
    "compiler.ir.factored": ("compiler.weights.ops.basic",),
    "compiler.ir.text": ("compiler.weights.expr",),
    "compiler.ir.parse": ("compiler.weights.expr",),
    "compiler.rewrite": ("compiler.ir", "compiler.weights"),
    "compiler.executor": (),
    "compiler.weights": ("compiler.ir", "compiler.executor"),
    "compiler.frontend": ("compiler.ir", "compiler.rewrite", "compiler.weights"),
    "passes": (
        "compiler.ir", "compiler.rewrite", "compiler.weights", "compiler.pipeline", "compiler.calibration",
        "compiler.allocate", "compiler.factor", "compiler.instrument", "compiler.latency", "compiler.masked",
    ),
    "backends": ("compiler.ir", "compiler.weights"),
    "backends.safetensors": ("compiler.ir", "compiler.weights", "compiler.frontend"),
    "backends.torch_module": ("compiler.ir", "compiler.weights", "backends.kernels"),
    "backends.kernels": (),
    "backends.binaries": ("backends.kernels",),
    "recipes": (),
    "compiler": ("compiler", "passes", "backends", "recipes"),
}  # fmt: skip

TRANSFORMERS = ("compiler.frontend", "compiler.weights", "compiler.evaluate", "backends.safetensors")
"""Where transformers may be imported. Within compiler.weights only where checkpoints are read: see below."""

CHECKPOINTS = ("checkpoint", "conversion", "gguf")
"""How the names of those files in compiler.weights begin."""


KERNELS = ROOT / "backends" / "kernels"
"""Files that checkpoints carry, where they have other neighbours: their imports of each other are relative."""


def _modules() -> dict[str, Path]:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {_name(path): path for path in files}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = _modules()


@cache
def _imports(path: Path) -> set[str]:
    """Every module imported at run time, wherever in the file; what only a type checker reads does not count."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent == KERNELS, f"relative import in {path}"
            base = f"backends.kernels.{node.module}" if node.level else node.module or ""
            found.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names)
        pending += ast.iter_child_nodes(node)
    return found


def _within(module: str, prefixes) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def _package(module: str) -> str:
    return max((prefix for prefix in ALLOWED if _within(module, [prefix])), key=len)


def _own(module: str) -> str:
    """The part a module belongs to, whose files may import each other: its first two names."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_lies_below_them(module):
    allowed = (*ALLOWED[_package(module)], _own(module), "compiler.errors")
    wrong = {
        name
        for name in _imports(MODULES[module])
        if _within(name, PACKAGES) and not _within(name, allowed) and name != "compiler"
    }
    assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", [module for module in MODULES if _within(module, ["passes"])])
def test_no_pass_imports_another(module):
    own = ".".join(module.split(".")[:2])
    others = {name for name in _imports(MODULES[module]) if _within(name, ["passes"]) and not _within(name, [own])}
    assert not others or module == "passes"


@pytest.mark.parametrize("module", MODULES)
def test_transformers_is_imported_only_where_models_are_read_and_written(module):
    roots = {name.split(".")[0] for name in _imports(MODULES[module])}
    if not roots & {"transformers", "gguf"} or (roots & {"gguf"} and _within(module, ["backends.gguf"])):
        return
    assert _within(module, TRANSFORMERS), f"{module} imports transformers or gguf"
    if _within(module, ["compiler.weights"]):
        assert module.rpartition(".")[2].startswith(CHECKPOINTS), f"{module} imports transformers or gguf"


def test_the_graph_needs_only_torch_and_its_helpers():
    third_party = {"torch", "networkx", "sympy"}
    for module in MODULES:
        if _within(module, ["compiler.ir", "compiler.rewrite"]):
            roots = {name.split(".")[0] for name in _imports(MODULES[module])}
            assert roots <= {*sys.stdlib_module_names, *third_party, "compiler"}, module


def test_kernels_need_only_torch_and_triton():
    for module in MODULES:
        if _within(module, ["backends.kernels"]):
            others = {name for name in _imports(MODULES[module]) if not _within(name, ["backends.kernels"])}
            roots = {name.split(".")[0] for name in others}
            assert roots <= {*sys.stdlib_module_names, "torch", "triton"}, module


def test_the_command_starts_without_heavy_libraries():
    heavy = ("torch", "transformers", "numpy", "networkx", "sympy")
    code = f"import sys, compiler.cli; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
