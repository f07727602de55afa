"""What the benchmarks share: running the command on a recipe, timing processes, printing tables."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = ROOT / "models" / "minilm"
WORK = ROOT / "out" / "benchmarks"
PEER = ["llmcompressor==0.14.0.1", "torch==2.13.0"]
PEERS = ROOT / "out" / "peers"
COMMAND = [sys.executable, "-m", "compiler.cli"]


@dataclass(frozen=True)
class Finished:
    """A process that ended well: what it printed, its time, and the most resident memory it held, in bytes.

    ``seconds`` passed on the clock, ``cpu_seconds`` on the processors; on a busy machine compare the latter.
    """

    output: str
    seconds: float
    cpu_seconds: float
    peak_rss: int


def run(command: Sequence[str], **environment: str) -> Finished:
    """Run ``command`` in the project's root; its errors go to our standard error. Exits when it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, env={**os.environ, **environment})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"`{' '.join(command)}` failed with {process.returncode}\n{text}")
    seconds = time.perf_counter() - started
    return Finished(text, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def compress(name: str, model: Path, passes: Sequence[Any]) -> tuple[Path, Finished]:
    """Compress ``model`` with ``passes`` (as a recipe spells them) into out/benchmarks/NAME, from nothing."""
    WORK.mkdir(parents=True, exist_ok=True)
    recipe = WORK / f"{name}.yaml"
    recipe.write_text(json.dumps({"model": str(model), "passes": list(passes), "emit": ["safetensors"]}))
    out = WORK / name
    shutil.rmtree(out, ignore_errors=True)
    return out, run([*COMMAND, str(recipe), "-o", str(out), "--quiet"])


def peer_python(requirements: Sequence[str] = PEER, folder: Path = PEERS) -> Path:
    """The Python of an environment in ``folder`` that holds a peer, made when it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        run([str(python), "-m", "pip", "install", "-q", *requirements])
    return python


def weight_bytes(directory: Path) -> int:
    """Bytes of the weight files in a checkpoint."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table; the first row is its head."""
    print(f"\n{title}\n")
    print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows[1:]:
        print(f"| {' | '.join(row)} |")
