"""More victims: what the program has written itself and reads again, ONNX models, pictures, questions."""

from __future__ import annotations

import gzip
import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from compiler.compare import compare, comparison_text, read_output
from compiler.diff import diff
from compiler.errors import CheckpointError
from compiler.evaluate.images import read_pictures
from compiler.evaluate.metrics.choices import questions
from compiler.evaluate.photographs import photographs
from compiler.job import compress
from compiler.recipe import Recipe
from tests.small import write_recipe
from tests.torture.outcomes import SECONDS
from tests.torture.subjects import EVALUATION

COUNT = 4
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
QUESTIONS = [{"question": f"What is {n} and {n}?", "choices": ["0", str(2 * n)], "answer": 1} for n in range(1, 7)]


def write_outputs(work: Path) -> tuple[Path, Path]:
    """Two finished outputs of the tiny model in ``work``: the first with an ONNX model."""
    made = []
    for name, bits, emit in (("onnx-out", 8, "emit: [safetensors, onnx]\n"), ("plain-out", 4, "")):
        passes = f"[quantize: {{bits: {bits}, group: 16}}]"
        recipe = write_recipe(work, passes, EVALUATION + emit, name=f"{name}.yaml")
        made.append(compress(Recipe.load(recipe), work / name).path)
    return made[0], made[1]


def write_pictures(folder: Path, count: int) -> Path:
    """Labelled pictures in idx files, the pictures compressed; the file of the labels."""
    folder.mkdir()
    chance = random.Random(0)
    for part in ("train", "t10k"):
        pixels = struct.pack(">4B3I", 0, 0, 8, 3, count, 5, 5) + chance.randbytes(25 * count)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pixels, mtime=0))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(n % 3 for n in range(count))
        )
    return folder


def write_photographs(folder: Path) -> Path:
    """A folder of pictures in three formats."""
    from PIL import Image

    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg", "c.webp", "d.png"):
        Image.fromarray(pixels).save(folder / name)
    return folder


def write_processor(folder: Path) -> Path:
    """What makes pictures for a model, in a folder with pictures."""
    path = write_photographs(folder) / "preprocessor_config.json"
    path.write_text(json.dumps(PROCESSOR))
    return path


def write_questions(folder: Path) -> Path:
    """Questions with choices, in a folder of their own."""
    folder.mkdir()
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


def compared(one: Path, other: Path) -> str:
    """Outputs beside each other, by their reports."""
    found = compare([read_output(one), read_output(other)])
    return "" if comparison_text(found) else "the comparison is empty"


def told_apart(one: Path, other: Path) -> str:
    """What differs between two outputs, their lock files among it."""
    return "" if diff(str(one), str(other), values=False) else "the difference is empty"


def finished_again(recipe: Path, out: Path) -> str:
    """A finished output, of which the same job only tells what it is."""
    return "" if compress(Recipe.load(recipe), out).summary() else "the summary is empty"


def answered(model: Path) -> str:
    """An answer of an ONNX model, of two tokens, in a process of its own: its runtime may take the process with it."""
    command = [sys.executable, "-m", "compiler.cli", "run", str(model), "beer", "--max-new-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode == 0:
        return ""
    if done.returncode not in (1, 2) or "Traceback" in done.stderr or "error[internal]" in done.stderr:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr}")
    raise CheckpointError("refused", remedy="as it says" if "help: " in done.stderr else "")


def seen(folder: Path) -> str:
    """Labelled pictures of both parts."""
    found = [read_pictures(folder, part, COUNT) for part in ("train", "t10k")]
    return "" if all(each.pixels.shape[0] == COUNT == len(each.labels) for each in found) else "pictures are missing"


def looked_at(folder: Path) -> str:
    """Pictures as a model takes them, finite numbers."""
    found = photographs(folder, folder, 4, 0, (16, 16), (16, 16))
    return "" if all(bool(each.isfinite().all()) for each in found) else "a picture is not finite"


def asked(path: Path) -> str:
    """Questions, read as the metric reads them."""
    return "" if all(item.text for item in questions(cast(Any, SimpleNamespace(items=path)))) else "an item is empty"
