"""Tasks of EleutherAI's lm-eval, where that is installed: its numbers in the form of ours."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compiler.errors import DataError, first_line
from compiler.evaluate.estimates import Estimate
from compiler.evaluate.loading import load_model, load_tokenizer

NORMAL = 1.96  # standard errors from the mean to the ends of a 95 % interval


def harness(path: str, tasks: Sequence[str], *, trust_remote_code: bool = False) -> dict[str, dict[str, float]]:
    """Every number that lm-eval gives for ``tasks``, with an interval of 1.96 of its standard errors on both sides.

    A task is one that lm-eval has, or a file NAME.yaml with the task NAME. The model is loaded as for every
    other metric, in float32. Raises DataError when lm-eval is not installed, or fails: most tasks fetch their data
    from a hub.
    """
    try:
        evaluator: Any = importlib.import_module("lm_eval.evaluator")
        models: Any = importlib.import_module("lm_eval.models.huggingface")
        managers: Any = importlib.import_module("lm_eval.tasks")
    except ImportError as reason:
        raise DataError(f"lm-eval is not there: {reason}", remedy='pip install "lm-eval[hf]"') from reason
    files = [Path(task) for task in tasks if task.endswith(".yaml")]
    for file in files:
        if not file.is_file():
            raise DataError("there is no such task file", where=str(file), remedy="correct the path")
    model = load_model(path, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    try:
        wrapped = models.HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
        manager = managers.TaskManager(include_path=[str(file.parent) for file in files])
        names = [Path(task).stem if task.endswith(".yaml") else task for task in tasks]
        found = evaluator.simple_evaluate(model=wrapped, tasks=names, task_manager=manager, log_samples=False)
    except Exception as reason:
        raise DataError(
            f"lm-eval cannot run {', '.join(tasks)}: {first_line(reason)}",
            remedy="name tasks that it has, or a file NAME.yaml with the task NAME; most fetch their data from a hub",
        ) from reason
    return {
        f"lm-eval {task}: {name.partition(',')[0]}": asdict(_estimate(value, numbers.get(_error_of(name))))
        for task, numbers in found["results"].items()
        for name, value in numbers.items()
        if isinstance(value, float) and "_stderr" not in name
    }


def _error_of(name: str) -> str:
    metric, _, rest = name.partition(",")
    return f"{metric}_stderr,{rest}"


def _estimate(value: float, error: Any) -> Estimate:
    """A value and its interval; of no width where lm-eval gives no standard error."""
    width = NORMAL * error if isinstance(error, float) else 0.0
    return Estimate(value, value - width, value + width)
