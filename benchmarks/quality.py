"""Quality and size of quantised models, beside llm-compressor's rounding of the same weights to the same scheme.

SmolLM2-135M and MiniLM, evaluated by this project's evaluator on the same windows, each reloaded by plain transformers.
SmolLM2's weights come from a 4-bit file, so its 4-bit rows tell how a method meets that grid, not how it ranks.
``--no-peer`` leaves llm-compressor out; otherwise an environment for it is made in out/peers.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import MINILM, ROOT, SMOLLM2, WORK, compress, peer_python, run, show, weight_bytes
from benchmarks.fetch import fetch
from compiler.evaluate import evaluate_model
from compiler.evaluate.metrics import Estimate

TEXT = ROOT / "benchmarks" / "data" / "persuasion.txt"
SAMPLES = 8


@dataclass(frozen=True)
class Job:
    """One row: our passes, and the scheme (bits, group) for the peer when it has the same."""

    name: str
    passes: tuple[Any, ...]
    peer: tuple[int, int] | None = None


def quantised(bits: int, group: int, **options: Any) -> dict[str, Any]:
    return {"quantize": {"bits": bits, "group": group, "skip": ["lm_head"], **options}}


SMOLLM2_JOBS = (
    Job("latent attention, exact", ("gqa-to-mla",)),
    Job("int8, per row", (quantised(8, 0),), (8, 0)),
    Job("int4, groups of 64", (quantised(4, 64),), (4, 64)),
    Job("int3, groups of 64", (quantised(3, 64),), (3, 64)),
    Job("int4, asymmetric, groups of 32", (quantised(4, 32, symmetric=False),)),
    Job("latent attention, then int8", ("gqa-to-mla", quantised(8, 0))),
    Job("latent attention, then int4, groups of 64", ("gqa-to-mla", quantised(4, 64))),
)
MINILM_JOBS = (
    Job("int8, per row", (quantised(8, 0),), (8, 0)),
    Job("int4, groups of 128", (quantised(4, 128),), (4, 128)),
    Job("int3, groups of 128", (quantised(3, 128),), (3, 128)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-peer", action="store_true")
    peer = None if parser.parse_args().no_peer else peer_python()
    for name in ("smollm2", "minilm"):
        fetch(name)
    # The dense checkpoint that the peer reads, written by an empty recipe.
    dense, _ = compress("smollm2-dense", SMOLLM2, [])
    report("SmolLM2-135M-Instruct", dense, SMOLLM2_JOBS, peer, ["perplexity", "kl", "agreement"])
    report("all-MiniLM-L6-v2", MINILM, MINILM_JOBS, peer, ["cosine", "relative-error"])


def report(title: str, model: Path, jobs: tuple[Job, ...], peer: Path | None, metrics: list[str]) -> None:
    rows = [("what", "by", "MB", *metrics, "CPU seconds")]
    rows.append(("original", "", megabytes(model), *original(model, metrics), ""))
    for job in jobs:
        label = f"{model.name}-{job.name}".replace(",", "").replace(" ", "-")
        out, done = compress(label, model, job.passes)
        rows.append((job.name, "compress-model", *measured(out, model, metrics), f"{done.cpu_seconds:.0f}"))
        if peer is not None and job.peer is not None:
            theirs = WORK / f"{label}-peer"
            bits, group = job.peer
            script = str(ROOT / "benchmarks" / "peer_rtn.py")
            done = run([str(peer), script, str(model), str(theirs), str(bits), str(group)])
            rows.append((job.name, "llm-compressor", *measured(theirs, model, metrics), f"{done.cpu_seconds:.0f}"))
    show(title, rows)


def original(model: Path, metrics: list[str]) -> list[str]:
    alone = [name for name in metrics if name == "perplexity"]
    found = evaluate_model(model, data=TEXT, metrics=alone, samples=SAMPLES).metrics
    return [estimate(found[name]) if name in found else "" for name in metrics]


def measured(directory: Path, model: Path, metrics: list[str]) -> list[str]:
    found = evaluate_model(directory, against=model, data=TEXT, metrics=metrics, samples=SAMPLES).metrics
    return [megabytes(directory), *(estimate(found[name]) for name in metrics)]


def megabytes(directory: Path) -> str:
    return f"{weight_bytes(directory) / 1e6:.1f}"


def estimate(found: Estimate) -> str:
    return f"{found.value:.4g} ({found.low:.4g} to {found.high:.4g})"


if __name__ == "__main__":
    main()
