"""The lock file: everything that determines an output, so that the run can be repeated bit for bit."""

from __future__ import annotations

import hashlib
import io
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compiler import __version__
from compiler.datafiles import fingerprint
from compiler.ir.graph import Graph
from compiler.pipeline import Pass
from compiler.plan import file_bytes
from compiler.recipe import Recipe, relative
from compiler.recipe.schema import spell
from compiler.recipe.yamltree import Tree

PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors", "gguf", "numpy")
HEADER = "# What determined this output. The recipe below, on these inputs with these versions, repeats it.\n"


def make_lock(recipe: Recipe, graph: Graph) -> dict[str, Any]:
    """The resolved recipe, the fingerprints of all inputs, and the versions of everything that computes.

    Holds no time, no path that the recipe does not name, and no environment.
    """
    return {
        "recipe": resolved(recipe),
        "inputs": _inputs(recipe, graph),
        "versions": {
            "compress-model": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in (*PACKAGES, *_used_by(recipe))},
        },
    }


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with its includes merged in and every option spelt out."""
    text = recipe.text
    settled: dict[str, Any] = {"model": without_folder(text.get("model", recipe.model))}
    if recipe.inputs.image is not None:
        settled["inputs"] = {"image": recipe.inputs.image}
    if recipe.calibration is not None:
        settled["calibration"] = _options(recipe.calibration, text.get("calibration", {}))
    places = recipe.entries or (None,) * len(recipe.passes)
    settled["passes"] = [
        {step.key(): _settled(step, place, recipe.path)} for step, place in zip(recipe.passes, places, strict=True)
    ]
    settled["emit"] = [{_emitter(options): _options(options, {})} for options in recipe.emit]
    if recipe.evaluate is not None:
        settled["evaluate"] = _options(recipe.evaluate, text.get("evaluate", {}))
    return settled


def job_key(lock: Mapping[str, Any], identity: str) -> str:
    """A hash of the lock and the model's ``identity``: runs with the same key give the same output."""
    return hashlib.sha256(f"{lock_text(lock)}{identity}".encode()).hexdigest()


def lock_text(lock: Mapping[str, Any]) -> str:
    """The lock as YAML."""
    return HEADER + _yaml(lock)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A resolved recipe as YAML."""
    return _yaml(recipe)


def _yaml(value: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


def plain(value: Any) -> Any:
    """``value`` as lists, dicts and scalars that YAML and JSON hold."""
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [plain(inner) for inner in value]
    return without_folder(str(value)) if isinstance(value, Path) else value


def _options(section: Any, written: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a section; the paths of its files as the recipe writes them."""
    options = {name: value for name, value in plain(spell(section)).items() if (name, value) != ("items", None)}
    return options | {name: without_folder(written[name]) for name in ("data", "items") if name in written}


def without_folder(path: str) -> str:
    """A hub id or relative path as it is; of an absolute path, which means nothing elsewhere, the last part."""
    return Path(path).name if Path(path).is_absolute() else path


def _settled(step: Pass, place: Tree | None, recipe: Path | None) -> dict[str, Any]:
    """The options of a pass; the path of a file as the recipe writes it, or would if an included one does."""
    options = step.options()
    for name, value in options.items():
        if isinstance(value, Path):
            options[name] = without_folder(
                relative(place.items[name], recipe) if place is not None and recipe is not None else str(value)
            )
    return plain(options)


def _emitter(options: Any) -> str:
    return type(options).__name__.lower()


def _inputs(recipe: Recipe, graph: Graph) -> dict[str, Any]:
    hub = {} if Path(recipe.model).exists() else {"hub_id": recipe.model}
    inputs: dict[str, Any] = {
        "model": {
            **hub,
            "architecture": graph.origin.architecture,
            "fingerprint": graph.sources["model"].fingerprint(),
            "bytes": file_bytes(graph),
        }
    }
    for name, section in (("calibration", recipe.calibration), ("evaluate", recipe.evaluate)):
        if section is not None:
            inputs[name] = {"sha256": fingerprint(section.data)}
            items = getattr(section, "items", None)
            inputs[name] |= {"items": fingerprint(items)} if items is not None else {}
    for number, step in enumerate(recipe.passes, 1):
        files = {name: value for name, value in step.options().items() if isinstance(value, Path)}
        inputs |= {f"{number}-{name}": {"sha256": fingerprint(path)} for name, path in files.items()}
    return inputs


def _used_by(recipe: Recipe) -> list[str]:
    names = {name for step in recipe.passes for name in step.packages}
    compiles = recipe.checkpoint is not None and recipe.checkpoint.binaries
    return sorted(names | ({"triton"} if compiles else set()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
