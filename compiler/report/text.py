"""Rows and sentences that the model card, the page and the terminal share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from compiler.console import human_bytes, human_count, table
from compiler.datafiles import CAPTIONED
from compiler.recipe.schema import spell_value
from compiler.report.quality import Row, measured_rows

Document = Mapping[str, Any]
FILES = "bytes of their files"
BESIDE = ("onnx", "gguf")  # kinds of output with a folder of their own


def summary(document: Document, path: Path) -> str:
    """What the command prints when it is done."""
    output = document["output"]
    lines = [
        table([("", "before", "after", "change"), *comparison(document)]),
        "",
        f"{path / folder_of(output['target'])}: {output['architecture']}, {human_bytes(output['tensor_bytes'])}",
        *(f"  {'' if index else 'loads in':8} {place}" for index, place in enumerate(output["loads_in"])),
        f"  {verification_sentence(document)}",
        *_lines_beside(document, path, "onnx"),
        *_lines_beside(document, path, "gguf"),
        *([f"  {evaluated_on(document)}"] if document.get("not_evaluated") else []),
        f"  more: {path / 'compress' / 'report.html'}",
    ]
    return "\n".join(lines)


def folder_of(target: str) -> str:
    """The folder of an output that holds this target: the output itself for a checkpoint."""
    return next((kind for kind in BESIDE if target.startswith(kind)), "")


def loading_places(document: Document) -> list[str]:
    """Where an output loads, the ONNX model and the GGUF file beside a checkpoint too."""
    beside = {kind: found for kind in BESIDE if (found := _beside(document, kind))}
    others = [f"{kind}/: {place}" for kind, found in beside.items() for place in found["loads_in"]]
    return [*document["output"]["loads_in"], *others]


def _beside(document: Document, kind: str) -> Document | None:
    """The ONNX model or GGUF file of an output that is not all of it."""
    found = document.get(kind)
    return None if found is None or document["output"]["target"] == found["target"] else found


def _lines_beside(document: Document, path: Path, kind: str) -> list[str]:
    """What an ONNX model or a GGUF file beside a checkpoint is, and whether it was reloaded."""
    found = _beside(document, kind)
    if found is None:
        return []
    sentence = verification_sentence({"verification": found["verification"], "output": {"target": found["target"]}})
    lines = (f"  {'' if index else 'loads in':8} {place}" for index, place in enumerate(found["loads_in"]))
    size = human_bytes(found["tensor_bytes"])
    return [f"{path / kind}: {found['target']}, {size}", *lines, f"  {sentence}"]


def short_name(model: str) -> str:
    """A hub id as it is, a path's last part."""
    return PurePosixPath(model).name if model.startswith((".", "/")) or model.endswith(".gguf") else model


def comparison(document: Document) -> list[Row]:
    """Before, after and change of everything counted or measured."""
    before, after, output = document["ledger"]["before"], document["ledger"]["after"], document["output"]
    rows = [
        _row("parameters", before["parameters"], after["parameters"], human_count),
        _row("bytes of weights", before["stored_bytes"], output["tensor_bytes"], human_bytes),
        _row(FILES, document["inputs"]["model"]["bytes"], sum(output["files"].values()), human_bytes),
        _row("FLOPs a token", before["flops_per_token"], after["flops_per_token"], human_count),
        _row("cache bytes a token", before["cache_bytes_per_token"], after["cache_bytes_per_token"], human_bytes),
    ]
    counted = [row for row in rows if row[1:3] != ("0 B", "0 B") and (row[0] != FILES or row[1] != "0 B")]
    return [*counted, *measured_rows(document["evaluation"])]


def _row(name: str, before: float, after: float, show: Any) -> Row:
    return name, show(before), show(after), _change(before, after)


def _change(before: float, after: float) -> str:
    if not before:
        return ""
    return "same" if after == before else f"{100 * (after / before - 1):+.1f} %"


def evaluation_text(found: Mapping[str, Any]) -> str:
    """What ``compress-model eval`` prints."""
    rows = measured_rows(found)
    speed = found.get("speed")
    if speed is not None:
        rows += [
            (
                f"{name}, tokens/s",
                f"{speed[f'reference_{name}']:.1f}",
                f"{speed[name]:.1f}",
                f"{speed[name] / speed[f'reference_{name}']:.2f} x",
            )
            for name in ("prefill", "decode")
        ]
    inputs = found["inputs"]
    conditions = f"{items(inputs)}, in {found['dtype']}, 95 % intervals"
    if found["against"] is None:
        return "\n".join(
            [table([("", found["model"]), *((name, value) for name, _, value, _ in rows)]), "", conditions]
        )
    return "\n".join([table([("", found["against"], found["model"], "change"), *rows]), "", conditions])


def verification_sentence(document: Document) -> str:
    """Whether the result was reloaded, and what came of it."""
    found = document["verification"]
    if not found["performed"]:
        return f"Not verified by reloading: {found['skipped']}."
    runtime = "ONNX Runtime" if document["output"]["target"].startswith("onnx") else "plain transformers"
    if found["error"] == 0:
        return f"Reloaded by {runtime}: its outputs equal the compiled graph's to the last bit."
    return (
        f"Reloaded by {runtime}: its outputs differ from the compiled graph's by {found['error']:.2g} "
        f"of their scale (rounding may make that {found['tolerance']:.2g})."
    )


def evaluated_on(document: Document) -> str:
    """On what quality was measured, and what the intervals are; or that it was not measured."""
    found = document["evaluation"]
    if document.get("not_evaluated"):
        return f"The quality of the result was not measured: {document['not_evaluated']}."
    if found is None:
        return "The quality of the result was not measured: the recipe has no `evaluate`."
    inputs, data = found["inputs"], document["recipe"].get("evaluate", {}).get("data", "random tokens")
    return (
        f"Quality was measured in {found['dtype']} on {items(inputs)} of `{data}`; intervals are 95 % bootstrap "
        "intervals over these, and a difference whose paired interval holds zero is within noise."
    )


def items(inputs: Mapping[str, Any]) -> str:
    """How much was measured on: pictures, clips, or windows of tokens."""
    if "items" in inputs and inputs["data"] == "random":
        return "the items"
    what = {"pictures": "pictures", CAPTIONED: CAPTIONED, "speech": "clips"}.get(inputs.get("kind", "text"))
    return f"{inputs['samples']} {what}" if what else f"{inputs['samples']} windows of {inputs['length']} tokens"


def skips(entry: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(reason, places) of what a pass left alone."""
    reasons: dict[str, list[str]] = {}
    for skip in entry["skipped"]:
        reasons.setdefault(skip["reason"], []).append(skip["scope"])
    return list(reasons.items())


def chosen_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a pass's ``options`` that differ from its defaults."""
    from compiler.report.lock import plain
    from passes import pass_class, pass_names

    if name not in pass_names():
        return dict(options)
    fields = {field.name.replace("_", "-"): field for field in dataclasses.fields(pass_class(name))}
    usual = {key: plain(field.default) for key, field in fields.items() if field.default is not dataclasses.MISSING}
    made = {
        key: plain(field.default_factory())
        for key, field in fields.items()
        if field.default_factory is not dataclasses.MISSING
    }
    return {key: value for key, value in options.items() if key not in (usual | made) or value != (usual | made)[key]}


def spelt(options: Mapping[str, Any]) -> str:
    """Options as a recipe spells them, in flow style."""
    return spell_value(options)[1:-1]
