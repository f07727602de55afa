"""The commands ``eval`` and ``compare``: what models are worth, alone, against another and side by side."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compiler.console import Console
from compiler.errors import OutputError, UsageError


def trust_option(parser: argparse.ArgumentParser) -> None:
    """The option that lets code of a checkpoint run."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let Python code that comes with a checkpoint run on this machine",
    )


def whole(least: int, most: int = (1 << 63) - 1) -> Callable[[str], int]:
    """The type of an option that is a whole number from ``least`` to ``most``."""

    def read(text: str) -> int:
        if not least <= (value := int(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return value

    read.__name__ = "whole number"  # what argparse says of a text that is none
    return read


def write_page(path: Path, text: str) -> None:
    """Write a page. Raises OutputError when there is one already, or it cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as reason:
        raise OutputError(
            "the file exists: nothing is overwritten", where=str(path), remedy="choose another name, or move it away"
        ) from reason
    except OSError as reason:
        raise OutputError(
            f"cannot write the page: {reason.strerror}",
            where=str(path),
            remedy="name a file in a directory that you may write to",
        ) from reason


def _measure_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", metavar="REF", help="the model to compare with")
    parser.add_argument(
        "--data", type=Path, metavar="DATA", help="a text, recordings or pictures; random inputs without"
    )
    parser.add_argument("--items", type=Path, metavar="JSONL", help="questions, rated pairs or transcripts, one a line")
    parser.add_argument("--samples", type=whole(1), help="windows of the text, clips or pictures (16)")
    parser.add_argument("--length", type=whole(2), help="tokens in a window (512)")
    parser.add_argument("--seed", type=whole(0), help="where the windows lie (0)")
    parser.add_argument("--image", type=whole(1), metavar="N", help="pixels that pictures are high and wide")
    parser.add_argument("--metrics", type=lambda text: text.split(","), help="comma-separated; default: those that fit")
    parser.add_argument("--speed", action="store_true", help="also time the models, in turns")
    parser.add_argument("--json", action="store_true", help="print JSON")
    trust_option(parser)


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """Those options that say what to measure that are given: the others are as ``evaluate_model`` has them."""
    names = ("against", "data", "items", "metrics", "samples", "length", "seed", "image")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _measured(options: argparse.Namespace, model: str, console: Console) -> dict[str, Any]:
    from compiler.evaluate import evaluate_model

    with console.progress(f"evaluate {Path(model).name}") as advance:
        return evaluate_model(
            model,
            **_asked(options),
            trust_remote_code=options.trust_remote_code,
            on_progress=advance,
        ).to_dict()


def eval_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``eval``."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory or .gguf file")
    parser.add_argument("--lm-eval", metavar="TASKS", help="also these tasks of lm-eval, where that is installed")
    _measure_options(parser)


def evaluate(options: argparse.Namespace, console: Console) -> None:
    """Measure a model as plain transformers loads it: how well it predicts, how far it is from another."""
    if options.speed and options.against is None:
        raise UsageError("`--speed` compares two models", remedy="add `--against REF`")
    from compiler.report.text import evaluation_text

    timed: dict[str, Any] = {}
    if options.speed:  # first: it says at once when there is nothing to time
        from compiler.evaluate import compare_speed

        speed = compare_speed(options.model, options.against, trust_remote_code=options.trust_remote_code)
        timed = {"speed": dataclasses.asdict(speed)}
    found = _measured(options, options.model, console) | timed
    if options.lm_eval:
        from compiler.evaluate.harness import harness

        tasks = options.lm_eval.split(",")
        found["metrics"] |= harness(options.model, tasks, trust_remote_code=options.trust_remote_code)
    console.result(json.dumps(found, indent=2) if options.json else evaluation_text(found))


def compare_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``compare``."""
    parser.add_argument(
        "outputs", metavar="OUT", nargs="+", type=Path, help="directories that compress-model has written"
    )
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="draw cost against quality, as one self-contained page"
    )
    parser.add_argument("--quality", metavar="METRIC", help="what to rank by; default: the first that all have")
    parser.add_argument(
        "--cost", choices=["size", "cache", "flops", "speed"], default="size", help="what it is held to"
    )
    _measure_options(parser)


def compare_outputs(options: argparse.Namespace, console: Console) -> None:
    """Several outputs of one model beside each other: their costs, their worth, and which differences are noise."""
    if len(options.outputs) < 2:
        raise UsageError("one output has nothing to be compared with", remedy="name two or more")
    if options.cost == "speed" and not options.speed:
        raise UsageError("`--cost speed` needs speeds", remedy="add `--speed`")
    from compiler.compare import compare, comparison_text, read_output

    outputs = [read_output(path) for path in options.outputs]
    if _asked(options):
        outputs = [
            dataclasses.replace(output, evaluation=_measured(options, str(path), console))
            for output, path in zip(outputs, options.outputs, strict=True)
        ]
    if options.speed:
        from compiler.evaluate.speed import speeds

        timed = speeds(options.outputs, trust_remote_code=options.trust_remote_code)
        outputs = [
            dataclasses.replace(output, costs={**output.costs, "speed": decode})
            for output, (_, decode) in zip(outputs, timed, strict=True)
        ]
    found = compare(outputs, quality=options.quality, cost=options.cost)
    if options.html is not None:
        from compiler.report.pareto import pareto_page

        write_page(options.html, pareto_page(found))
    console.result(json.dumps(found.to_dict(), indent=2) if options.json else comparison_text(found))
