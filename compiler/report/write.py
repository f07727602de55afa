"""Everything that an output directory says about itself, written in one go."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backends.safetensors import Emission
from compiler.evaluate import Evaluation
from compiler.evaluate.parity import Verification
from compiler.instrument import peak_rss
from compiler.pipeline import Report
from compiler.plan import loads_in
from compiler.report.card import model_card
from compiler.report.lock import lock_text, plain
from compiler.report.page import page

SCHEMA = 1


@dataclass(frozen=True)
class Findings:
    """What a run knows when it has written its weights. ``seconds`` are those of each step."""

    report: Report
    emission: Emission
    verification: Verification
    evaluation: Evaluation | None
    lock: dict[str, Any]
    seconds: dict[str, float]


def write_reports(findings: Findings, directory: Path) -> dict[str, Any]:
    """Write the model card, report.json, report.html, the lock file and timings.json; returns what report.json holds.

    Documents that passes leave are written beside them: ``1-latency.json`` is that of the first pass.

    All but timings.json are the same bytes for the same run on the same machine.
    """
    document = make_document(findings, directory)
    folder = directory / "compress"
    folder.mkdir(exist_ok=True)
    texts = {
        directory / "README.md": model_card(document),
        folder / "report.json": _json(document),
        folder / "report.html": page(document),
        folder / "recipe.lock.yaml": lock_text(findings.lock),
        folder / "timings.json": _json(_timings(findings)),
    }
    for number, entry in enumerate(findings.report.passes, 1):
        texts |= {folder / f"{number}-{name}.json": _json(record) for name, record in entry.records.items()}
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return document


def make_document(findings: Findings, directory: Path) -> dict[str, Any]:
    """What report.json holds. Keys are only ever added; ``schema`` grows when one changes its meaning."""
    report, lock = findings.report, findings.lock
    files = sorted(directory.glob("*.safetensors"))
    return {
        "schema": SCHEMA,
        "recipe": lock["recipe"],
        "inputs": lock["inputs"],
        "versions": lock["versions"],
        "output": {
            "architecture": findings.emission.architecture,
            "model_type": findings.emission.config.get("model_type"),
            "target": findings.emission.target,
            "auto_class": findings.emission.auto_class,
            "quantization": findings.emission.quantization_config,
            "loads_in": list(loads_in(findings.emission)),
            "tensor_bytes": findings.emission.nbytes,
            "files": {file.name: file.stat().st_size for file in files},
            "other_files": sorted(file.name for file in directory.iterdir() if file.is_file() and file not in files),
        },
        "ledger": {"before": asdict(report.before), "after": asdict(report.after)},
        "passes": [_pass(entry) for entry in report.passes],
        "layers": {"before": dict(report.layers_before), "after": dict(report.layers_after)},
        "verification": asdict(findings.verification),
        "evaluation": _evaluation(findings.evaluation),
    }


def _pass(entry: Any) -> dict[str, Any]:
    apart = ("seconds", "peak_rss", "records")
    return plain({name: value for name, value in asdict(entry).items() if name not in apart})


def _evaluation(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    untimed = ("model", "against", "seconds")
    return {name: value for name, value in evaluation.to_dict().items() if name not in untimed}


def _timings(findings: Findings) -> dict[str, Any]:
    passes = [{"name": p.name, "seconds": p.seconds, "peak_rss": p.peak_rss} for p in findings.report.passes]
    return {"seconds": findings.seconds, "peak_rss": peak_rss(), "passes": passes}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
