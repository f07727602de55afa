"""Recipes: one YAML file that says which model, what is done to it, and what is written.

Loading checks everything that can be checked without the model: syntax, names, types, paths, includes and the
order of passes. Every error points at the place in the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compiler.datafiles import has_labelled, image_files, recordings
from compiler.errors import CompressError, OrderError, RecipeError, Span, nearest
from compiler.pipeline import Observer, Pass, order_conflicts, order_remedy
from compiler.recipe.schema import (
    EMITTERS,
    KEYS,
    SECTIONS,
    Calibration,
    Evaluate,
    Gguf,
    Inputs,
    Onnx,
    Run,
    Safetensors,
    build,
)
from compiler.recipe.yamltree import Tree, read_tree
from compiler.weights.checkpoint import is_hub_id
from passes import pass_class, pass_names

INCLUDED = "included"
FILES = ("data", "items")
LOCK = "this is a lock file: copy what stands under `recipe` to a recipe beside the one that it was made from"


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. ``model`` and data paths are ready to open; ``text`` is the recipe as merged and written.

    ``places`` are where its keys stand, ``entries`` where its passes stand, for errors that appear once the model is
    known.
    """

    model: str
    passes: tuple[Pass, ...] = ()
    emit: tuple[Any, ...] = ()
    inputs: Inputs = field(default_factory=Inputs)
    calibration: Calibration | None = None
    evaluate: Evaluate | None = None
    run: Run = field(default_factory=Run)
    path: Path | None = None
    text: dict[str, Any] = field(default_factory=dict[str, Any])
    places: Mapping[str, Tree] = field(default_factory=dict[str, Tree], repr=False)
    entries: tuple[Tree, ...] = field(default=(), repr=False)

    @classmethod
    def load(cls, path: str | Path, *, model: str | None = None) -> Recipe:
        """Read and check the recipe at ``path``; ``model`` stands in for the one it names.

        Raises RecipeError or OrderError, pointing at the place in the file.
        """
        root = Path(path)
        merged = _merge(root, root.resolve().parent, (root.resolve(),))
        return _Checker(root).recipe(merged, model)

    @property
    def checkpoint(self) -> Safetensors | None:
        """How the checkpoint is written; None when none is."""
        return next((wanted for wanted in self.emit if isinstance(wanted, Safetensors)), None)

    @property
    def compact(self) -> bool:
        """Whether sparse weights are stored as bits and values."""
        return self.checkpoint is not None and self.checkpoint.compact

    @property
    def onnx(self) -> Onnx | None:
        """How ONNX models are written; None when none are."""
        return next((wanted for wanted in self.emit if isinstance(wanted, Onnx)), None)

    @property
    def gguf(self) -> Gguf | None:
        """How a GGUF file is written; None when none is."""
        return next((wanted for wanted in self.emit if isinstance(wanted, Gguf)), None)

    def locate(self) -> Observer:
        """An observer that makes errors of passes point at the recipe."""
        return _Locator(self.entries)


class _Locator(Observer):
    def __init__(self, entries: Sequence[Tree]) -> None:
        self._entries = entries

    def failed(self, index: int, step: Pass, graph: Any, error: CompressError) -> None:
        entry = self._entries[index]
        option = entry.items.get(error.option.replace("_", "-"))
        error.span = error.span or (option.span if option else entry.place)


def _merge(path: Path, root: Path, chain: tuple[Path, ...]) -> dict[str, Tree]:
    """The top-level entries of the recipe at ``path`` with its includes merged in."""
    tree = read_tree(path)
    if not isinstance(tree.value, dict):
        raise RecipeError(
            f"a recipe is a mapping of keys, not {tree.kind}", span=tree.span, remedy=f"its keys are: {', '.join(KEYS)}"
        )
    for key, value in tree.value.items():
        if key not in KEYS:
            lock = {"recipe", "versions"} <= tree.value.keys()
            remedy = LOCK if lock else nearest(key, KEYS)
            raise RecipeError(f"a recipe has no key `{key}`", span=value.key, remedy=remedy)
    merged: dict[str, Tree] = {}
    for item in _include_list(tree.value.get("include")):
        merged = _overlay(merged, _merge(_included_path(item, root, chain), root, _chain(item, root, chain)))
    return _overlay(merged, {key: value for key, value in tree.value.items() if key != "include"})


def _include_list(tree: Tree | None) -> Sequence[Tree]:
    if tree is None:
        return ()
    items = tree.value if isinstance(tree.value, tuple) else (tree,)
    for item in items:
        if not isinstance(item.value, str):
            raise RecipeError(
                f"`include` must be a path or a list of paths, not {item.kind}",
                span=item.span,
                remedy="write `include: other.yaml`",
            )
    return items


def _included_path(item: Tree, root: Path, chain: tuple[Path, ...]) -> Path:
    path = item.span.path.parent / str(item.value)
    resolved = path.resolve()
    if not resolved.is_relative_to(root):
        raise RecipeError(
            f"`{item.value}` leaves the recipe's directory",
            span=item.span,
            remedy="an included recipe lies beside the recipe or below it",
        )
    if resolved in chain:
        names = " includes ".join(f"`{step.name}`" for step in (*chain[chain.index(resolved) :], resolved))
        raise RecipeError(f"recipes include each other: {names}", span=item.span, remedy="remove one of the includes")
    if not resolved.is_file():
        raise RecipeError(
            f"there is no recipe `{item.value}`",
            span=item.span,
            remedy="paths are relative to the file that names them",
        )
    return path


def _chain(item: Tree, root: Path, chain: tuple[Path, ...]) -> tuple[Path, ...]:
    return (*chain, _included_path(item, root, chain).resolve())


def _overlay(base: dict[str, Tree], top: dict[str, Tree]) -> dict[str, Tree]:
    """``top`` over ``base``: sections merge by key, passes follow on, everything else is replaced."""
    merged = dict(base)
    for key, tree in top.items():
        below = base.get(key)
        if key == "passes":
            merged[key] = _passes_after(below, tree)
        elif below is not None and isinstance(below.value, dict) and isinstance(tree.value, dict):
            merged[key] = replace(tree, value={**below.value, **tree.value})
        else:
            merged[key] = tree
    return merged


def _passes_after(base: Tree | None, top: Tree) -> Tree:
    if not isinstance(top.value, tuple):
        raise RecipeError(
            f"`passes` must be a list, not {top.kind}",
            span=top.place,
            remedy="write one pass a line: `- name: {option: value}`",
        )
    earlier = base.value if base is not None and isinstance(base.value, tuple) else ()
    marks = [index for index, entry in enumerate(top.value) if entry.value == INCLUDED]
    if len(marks) > 1:
        raise RecipeError("`included` stands here twice", span=top.value[marks[1]].span, remedy="keep one")
    if marks and base is None:
        raise RecipeError(
            "`included` stands for the passes of an `include`, and there are none",
            span=top.value[marks[0]].span,
            remedy="remove it, or add `include: other.yaml`",
        )
    at = marks[0] if marks else 0
    return replace(top, value=(*top.value[:at], *earlier, *top.value[at + len(marks) :]))


class _Checker:
    """Turns merged entries into a Recipe. ``path`` is the recipe that the user named."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._root = path.resolve().parent

    def recipe(self, entries: dict[str, Tree], model: str | None) -> Recipe:
        listed = tuple(self._list(entries, "passes"))
        passes = tuple(self._pass(name, tree) for name, tree in listed)
        places = tuple(tree for _, tree in listed)
        calibration = self._section(entries, "calibration")
        self._check_order(passes, places)
        self._check_needs(passes, places, calibration)
        return Recipe(
            model=model or self._model(entries),
            passes=passes,
            emit=self._emit(entries),
            inputs=self._section(entries, "inputs") or Inputs(),
            calibration=calibration,
            evaluate=self._section(entries, "evaluate"),
            run=self._section(entries, "run") or Run(),
            path=self._path,
            text=self._text(entries, model),
            places={key: tree for key, tree in entries.items() if key != "model" or model is None},
            entries=places,
        )

    def _model(self, entries: dict[str, Tree]) -> str:
        tree = entries.get("model")
        if tree is None:
            first = next(iter(entries.values()), None)
            span = first.key if first and first.key else Span(self._path, 1, 1, 1, "")
            raise RecipeError("the recipe names no `model`", span=span, remedy="add `model: path/to/checkpoint`")
        if not isinstance(tree.value, str) or not tree.value:
            raise RecipeError(
                f"`model` must be a path or a hub id, not {tree.kind}",
                span=tree.span,
                remedy="write `model: path/to/checkpoint`",
            )
        path = self._resolve(tree)
        if path.exists():
            return str(path)
        if is_hub_id(tree.value):
            return tree.value
        raise RecipeError(
            f"there is no model `{tree.value}`",
            span=tree.span,
            remedy="paths are relative to the recipe, `~` is not expanded; a hub id looks like `owner/name`",
        )

    def _list(self, entries: dict[str, Tree], key: str) -> Iterator[tuple[str, Tree]]:
        """(name, options) of each entry of ``passes`` or ``emit``; the options' key is the entry's name."""
        tree = entries.get(key)
        if tree is None or tree.value == ():
            return
        if not isinstance(tree.value, tuple):
            raise RecipeError(
                f"`{key}` must be a list, not {tree.kind}",
                span=tree.place,
                remedy="write one entry a line: `- name` or `- name: {option: value}`",
            )
        for item in tree.value:
            yield self._entry(item, key)

    def _entry(self, item: Tree, key: str) -> tuple[str, Tree]:
        if isinstance(item.value, str):
            return item.value, Tree(None, item.span, item.span)
        if not isinstance(item.value, dict) or not item.value:
            raise RecipeError(
                f"an entry of `{key}` is a name, or a name with options, not {item.kind}",
                span=item.span,
                remedy="write `- name` or `- name: {option: value}`",
            )
        names = list(item.value)
        if len(names) > 1:
            second = item.value[names[1]]
            raise RecipeError(
                f"one entry of `{key}` holds `{names[0]}` and `{names[1]}`",
                span=second.place,
                remedy=f"start a new entry: `- {names[1]}`, or indent it as an option",
            )
        return names[0], item.value[names[0]]

    def _pass(self, name: str, tree: Tree) -> Pass:
        known = pass_names()
        if name not in known:
            remedy = nearest(name.replace("_", "-"), known)
            raise RecipeError(f"there is no pass `{name}`", span=tree.place, remedy=remedy)
        step = build(pass_class(name), tree, name)
        options = {option for option, value in step.options().items() if isinstance(value, Path)}
        files = {option.replace("-", "_"): self._file(tree.items[option]) for option in options}
        return replace(step, **files) if files else step

    def _emit(self, entries: dict[str, Tree]) -> tuple[Any, ...]:
        if "emit" not in entries:
            return (EMITTERS["safetensors"](),)
        chosen: dict[str, Any] = {}
        for name, tree in self._list(entries, "emit"):
            if name not in EMITTERS:
                remedy = nearest(name, EMITTERS)
                raise RecipeError(f"there is no output format `{name}`", span=tree.place, remedy=remedy)
            if name in chosen:
                raise RecipeError(f"`{name}` is emitted twice", span=tree.place, remedy="keep one")
            chosen[name] = build(EMITTERS[name], tree, name)
        if not chosen:
            raise RecipeError(
                "`emit` is empty: nothing would be written",
                span=entries["emit"].place,
                remedy="write `emit: [safetensors]`, or leave `emit` out",
            )
        if "evaluate" in entries and not {"safetensors", "gguf"} & chosen.keys():
            raise RecipeError(
                "`evaluate` measures a checkpoint, and none is written",
                span=entries["emit"].place,
                remedy="write `emit: [safetensors, onnx]`, or leave `evaluate` out",
            )
        return tuple(chosen.values())

    def _section(self, entries: dict[str, Tree], name: str) -> Any:
        tree = entries.get(name)
        if tree is None:
            return None
        section = build(SECTIONS[name], tree, name)
        read = {"data": self._data, "items": self._file}
        found = {key: read[key](tree.items[key]) for key in FILES if key in tree.items}
        return replace(section, **found) if found else section

    def _data(self, tree: Tree) -> Path:
        path = self._resolve(tree)
        if path.is_dir() and not (recordings(path) or image_files(path) or has_labelled(path)):
            cause = f"the directory `{tree.value}` has no recordings and no pictures"
            remedy = "name a text file, or a directory of recordings (.wav) or of image files"
            raise RecipeError(cause, span=tree.span, remedy=remedy)
        if not path.exists():
            raise RecipeError(
                f"there is no file `{tree.value}`",
                span=tree.span,
                remedy="paths are relative to the file that names them",
            )
        if not path.is_dir() and not path.is_file():
            raise RecipeError(f"`{tree.value}` is no regular file", span=tree.span, remedy="name a file or a directory")
        return path

    def _file(self, tree: Tree) -> Path:
        if self._resolve(tree).is_dir():
            raise RecipeError(f"`{tree.value}` is a directory", span=tree.span, remedy="name a file")
        return self._data(tree)

    def _resolve(self, tree: Tree) -> Path:
        """The path that ``tree`` names. One written in an included recipe may not leave the recipe's directory."""
        path = tree.span.path.parent / str(tree.value)
        own = tree.span.path.resolve() == self._path.resolve()
        if not own and not path.resolve().is_relative_to(self._root):
            raise RecipeError(
                f"`{tree.value}` leaves the recipe's directory",
                span=tree.span,
                remedy="only the recipe itself, not one that it includes, may name files elsewhere",
            )
        return path

    def _check_order(self, passes: Sequence[Pass], places: Sequence[Tree]) -> None:
        for late, early, reason in order_conflicts(passes):
            raise OrderError(reason, span=places[late].place, remedy=order_remedy(passes, late, early))

    def _check_needs(self, passes: Sequence[Pass], places: Sequence[Tree], calibration: Calibration | None) -> None:
        for step, place in zip(passes, places, strict=True):
            if step.calibrated and calibration is None:
                raise RecipeError(
                    f"`{step.key()}` needs calibration data",
                    span=place.place,
                    remedy="add `calibration: {data: text.txt}`",
                )

    def _text(self, entries: dict[str, Tree], model: str | None) -> dict[str, Any]:
        given = {} if model is None else {"model": model}
        return {key: self._as_written(key, tree) for key, tree in entries.items() if key not in given} | given

    def _as_written(self, key: str, tree: Tree) -> Any:
        """Plain data of ``tree``; relative paths of included recipes made relative to the recipe."""
        if key == "model" and isinstance(tree.value, str) and self._resolve(tree).exists():
            return relative(tree, self._path)
        plain = tree.plain()
        if key in ("calibration", "evaluate"):
            plain |= {name: relative(tree.items[name], self._path) for name in FILES if name in tree.items}
        return plain


def relative(tree: Tree, recipe: Path) -> str:
    """The path that ``tree`` writes, relative to ``recipe``, which may include the file that ``tree`` stands in."""
    text = str(tree.value)
    if Path(text).is_absolute():
        return text
    return Path(os.path.relpath(tree.span.path.parent / text, recipe.parent)).as_posix()
