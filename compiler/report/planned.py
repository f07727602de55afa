"""The page of a plan, in the form of a run's report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from compiler import __version__
from compiler.plan import Plan
from compiler.recipe import Recipe
from compiler.report.lock import plain, resolved
from compiler.report.page import plan_page


def planned_page(recipe: Recipe, plan: Plan) -> str:
    """report.html of what ``recipe`` would give. Raises TargetError when nothing holds the result."""
    return plan_page(planned_document(recipe, plan))


def planned_document(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What report.json would hold, as far as it is known before anything is computed. Raises as ``planned_page``."""
    report, output = plan.report, plan.check()
    checkpoint = {name: size for name, size in output.files.items() if "/" not in name}
    return {
        "recipe": resolved(recipe),
        "inputs": {"model": {"architecture": plan.model.partition(" from ")[0], "bytes": 0}},
        "versions": {"compress-model": __version__},
        "output": {
            "architecture": output.architecture,
            "target": "",
            "loads_in": list(output.loads_in),
            "tensor_bytes": sum(checkpoint.values() or output.files.values()),
            "files": dict(output.files),
        },
        "ledger": {"before": asdict(report.before), "after": asdict(report.after)},
        "passes": [plain(asdict(entry)) for entry in report.passes],
        "layers": {"before": dict(report.layers_before), "after": dict(report.layers_after)},
        "matrices": {
            "before": [plain(asdict(matrix)) for matrix in report.matrices_before],
            "after": [plain(asdict(matrix)) for matrix in report.matrices_after],
        },
        "evaluation": None,
    }
