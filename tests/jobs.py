"""A job of many small tensors, run in a process of its own so that it can be killed."""

import multiprocessing
import time
from pathlib import Path

import torch

from compiler import Recipe, compress
from compiler.output import OutputDirectory
from compiler.weights.checkpoint import open_checkpoint
from compiler.weights.expr import load
from compiler.weights.ops.quant import pack_bits, quantise
from compiler.weights.writer import write

LAYERS = 24
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__, "compiler.frontend.capture", "transformers.models.llama"])


def tensors_of(checkpoint):
    """Every weight of a checkpoint in four bits: packed codes and scales."""
    tensors = {}
    for name, type in checkpoint.types.items():
        codes, scale = quantise(load("model", name, type), 4, 32, scale_dtype=torch.bfloat16).args
        tensors[f"{name}_packed"], tensors[f"{name}_scale"] = pack_bits(codes, 4), scale
    return tensors


def run_job(model: Path, out: Path, log: Path | None = None, pause: float = 0.0) -> None:
    """Quantise ``model`` into ``out``. What an earlier run has left (bytes) is appended to ``log``."""
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(model)
    started = []

    def on_progress(done: int, total: int) -> None:
        if not started and log is not None:
            with log.open("a") as file:
                file.write(f"{done}\n")
        started.append(done)
        time.sleep(pause)

    with OutputDirectory(out, "0123456789abcdef") as output:
        (output.files / "config.json").write_text("{}")
        write(
            tensors_of(checkpoint),
            {"model": checkpoint},
            output.files,
            journal=output.state / "journal",
            shard_bytes=100_000,
            safe_bytes=10_000,
            on_progress=on_progress,
        )
        output.commit()


def peak_of_a_job(model: Path, out: Path) -> int:
    """The bytes by which the memory of a fresh process grows, at most, while it quantises ``model`` into ``out``."""
    results = PROCESSES.SimpleQueue()
    process = PROCESSES.Process(target=_measure_peak, args=(model, out, results))
    process.start()
    process.join()
    return results.get()


def _measure_peak(model: Path, out: Path, results) -> None:
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    held = _kilobytes("VmRSS")
    write(tensors_of(checkpoint), {"model": checkpoint}, out, budget=16 << 20)
    results.put((_kilobytes("VmHWM") - held) * 1024)


def _kilobytes(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry))


def run_recipe(recipe: Path, out: Path) -> None:
    """The whole job, as the command does it."""
    torch.set_num_threads(1)
    compress(Recipe.load(recipe), out)


def start(job, *arguments) -> multiprocessing.Process:
    """``job(*arguments)`` in a fresh process that has imported everything already."""
    process = PROCESSES.Process(target=job, args=arguments)
    process.start()
    return process
