"""Everything that an output directory says about itself, written in one go."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.safetensors import Emission
from compiler.evaluate import Evaluation
from compiler.evaluate.parity import Verification
from compiler.instrument import peak_rss
from compiler.pipeline import Report
from compiler.plan import loads_in
from compiler.report.card import model_card
from compiler.report.lock import lock_text, plain
from compiler.report.page import page

if TYPE_CHECKING:
    from backends.gguf import GgufEmission
    from backends.onnx import OnnxEmission

SCHEMA = 1
CARD = "README.md"


@dataclass(frozen=True)
class Findings:
    """What a run knows when it has written its weights. ``seconds`` are those of each step.

    ``not_evaluated`` says why an evaluation that was asked for is None.
    """

    report: Report
    emission: Emission | None
    verification: Verification | None
    evaluation: Evaluation | None
    lock: dict[str, Any]
    seconds: dict[str, float]
    onnx: OnnxEmission | None = None
    onnx_verification: Verification | None = None
    gguf: GgufEmission | None = None
    gguf_verification: Verification | None = None
    not_evaluated: str = ""

    @property
    def main(self) -> Emission | OnnxEmission | GgufEmission:
        """The checkpoint, or where none is written the ONNX model or the GGUF file."""
        found = self.emission or self.onnx or self.gguf
        assert found is not None  # a recipe that writes nothing is refused
        return found


def write_reports(findings: Findings, directory: Path) -> dict[str, Any]:
    """Write the model card, report.json, report.html, the lock file and timings.json; returns what report.json holds.

    Documents that passes leave are written beside them: ``1-latency.json`` is that of the first pass.

    All but timings.json are the same bytes for the same run on the same machine.
    """
    document = make_document(findings, directory)
    folder = directory / "compress"
    folder.mkdir(exist_ok=True)
    texts = {
        directory / CARD: model_card(document),
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
    files = weight_files(directory)
    known = {*files, directory / CARD}  # an interrupted run may have left the card
    main, verifications = findings.main, (findings.verification, findings.onnx_verification, findings.gguf_verification)
    verification = next((found for found in verifications if found is not None), None)
    assert verification is not None  # what is written is verified, or said to be not
    return {
        "schema": SCHEMA,
        "recipe": lock["recipe"],
        "inputs": lock["inputs"],
        "versions": lock["versions"],
        "output": {
            "architecture": main.architecture,
            "model_type": main.config.get("model_type"),
            "target": main.target,
            "auto_class": findings.emission.auto_class if findings.emission else "",
            "quantization": findings.emission.quantization_config if findings.emission else None,
            "loads_in": list(loads_in(main)),
            "tensor_bytes": main.nbytes,
            "files": {file.relative_to(directory).as_posix(): file.stat().st_size for file in files},
            "other_files": sorted(file.name for file in directory.iterdir() if file.is_file() and file not in known),
        },
        "ledger": {"before": asdict(report.before), "after": asdict(report.after)},
        "passes": [_pass(entry) for entry in report.passes],
        "layers": {"before": dict(report.layers_before), "after": dict(report.layers_after)},
        "matrices": {
            "before": [plain(asdict(matrix)) for matrix in report.matrices_before],
            "after": [plain(asdict(matrix)) for matrix in report.matrices_after],
        },
        "verification": asdict(verification),
        "onnx": _onnx(findings, directory),
        "gguf": _gguf(findings, directory),
        "evaluation": _evaluation(findings.evaluation),
        "not_evaluated": findings.not_evaluated,
    }


def weight_files(directory: Path) -> list[Path]:
    """The files that tensors lie in: those of the checkpoint, or where there is none those of the other models."""
    found = (sorted(directory.glob(pattern)) for pattern in ("*.safetensors", "*/*.safetensors", "*/*.gguf"))
    return next((files for files in found if files), [])


def _onnx(findings: Findings, directory: Path) -> dict[str, Any] | None:
    if findings.onnx is None or findings.onnx_verification is None:
        return None
    files = sorted(file for file in (directory / "onnx").iterdir() if file.is_file())
    return {
        "target": findings.onnx.target,
        "kind": findings.onnx.kind,
        "loads_in": list(findings.onnx.loads_in),
        "tensor_bytes": findings.onnx.nbytes,
        "input_errors": None if findings.onnx.levels is None else dict(findings.onnx.levels.errors),
        "files": {file.name: file.stat().st_size for file in files},
        "verification": asdict(findings.onnx_verification),
    }


def _gguf(findings: Findings, directory: Path) -> dict[str, Any] | None:
    if findings.gguf is None or findings.gguf_verification is None:
        return None
    return {
        "target": findings.gguf.target,
        "loads_in": list(findings.gguf.loads_in),
        "tensor_bytes": findings.gguf.nbytes,
        "files": {file.name: file.stat().st_size for file in sorted((directory / "gguf").iterdir())},
        "verification": asdict(findings.gguf_verification),
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
