"""Quantise checkpoints far larger than the memory in use: peak memory by layers, speed beside a copy and a peer.

Makes Llama-shaped bf16 checkpoints with random weights in shards (32 layers: 8 GB), rounds them to int4 in groups of
128 with the command, and reads the peak memory of that process. At the largest size every contender runs in turn, a few
rounds over, from a cold page cache to synced files: our command, a copy of the same files, and llm-compressor's
``model_free_ptq``, which rounds shard by shard without building the model. Medians are compared.

``--layers 8 16 32`` sizes, ``--rounds 3``, ``--no-peer`` leaves the peer out. Needs 14 GB of disk, gives it back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import COMMAND, WORK, Finished, peer_python, run, show, weight_bytes

HIDDEN, INNER, HEADS, GROUPS, HEAD_DIM, VOCABULARY = 3072, 8192, 24, 8, 128, 128256
SHARD_BYTES = 2_000_000_000
MEMORY_LIMIT = 1_500_000_000
PASSES = [{"quantize": {"where": "linear", "skip": ["lm_head"], "bits": 4, "group": 128, "scale": "minmax"}}]
COPY = """
import os, shutil, sys
from pathlib import Path
target = Path(sys.argv[2])
target.mkdir()
for file in Path(sys.argv[1]).iterdir():
    shutil.copyfile(file, target / file.name)
"""
PEER = """
import sys
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import model_free_ptq
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
ignore = ["lm_head", "model.embed_tokens"]
model_free_ptq(sys.argv[1], sys.argv[2], scheme=scheme, ignore=ignore, max_workers=2, device="cpu")
"""


@dataclass
class Contender:
    """A command that makes a directory out of a checkpoint, and how its runs went."""

    name: str
    command: list[str]
    runs: list[Finished] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(run.cpu_seconds for run in self.runs)

    @property
    def peak_rss(self) -> int:
        return max(run.peak_rss for run in self.runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--make", type=Path, help="only make a checkpoint of --layers layers there")
    options = parser.parse_args()
    if options.make:
        write_checkpoint(options.make, options.layers[0])
        return
    peer = None if options.no_peer else peer_python()
    work = WORK / "streaming"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        grow_rows = [memory_row(work, layers) for layers in options.layers]
        show("Peak memory by number of layers", [["layers", "in", "out", "peak memory"], *grow_rows])
        compare(work, max(options.layers), options.rounds, peer)
    finally:
        shutil.rmtree(work)


def memory_row(work: Path, layers: int) -> list[str]:
    """Convert a checkpoint of ``layers`` layers once. Exits when the peak is above the limit."""
    model = make_checkpoint(work / "model", layers)
    ours = our_command(work, model)
    done = timed(ours.command, model, work / "out")
    row = [str(layers), _gigabytes(weight_bytes(model)), _gigabytes(weight_bytes(work / "out")), _mb(done.peak_rss)]
    shutil.rmtree(work / "out")
    shutil.rmtree(model)
    if done.peak_rss > MEMORY_LIMIT:
        sys.exit(f"{layers} layers took {_mb(done.peak_rss)}, more than the limit of {_mb(MEMORY_LIMIT)}")
    return row


def compare(work: Path, layers: int, rounds: int, peer: Path | None) -> None:
    """Run all contenders in turn, ``rounds`` times over, and print medians and ratios to the copy."""
    model = make_checkpoint(work / "model", layers)
    copy = Contender("copy of the files", [sys.executable, "-c", COPY, str(model), str(work / "out")])
    contenders = [copy, our_command(work, model)]
    if peer is not None:
        command = [str(peer), "-c", PEER, str(model), str(work / "out")]
        contenders.append(Contender("llm-compressor model_free_ptq", command))
    steps: list[dict[str, float]] = []
    for _ in range(rounds):
        for contender in contenders:
            contender.runs.append(timed(contender.command, model, work / "out"))
            steps += _steps(work / "out")
            shutil.rmtree(work / "out")
    size = weight_bytes(model)
    rows = [
        [
            c.name,
            f"{c.seconds:.1f} s",
            f"{c.cpu_seconds:.1f} s",
            f"{size / c.seconds / 1e6:.0f} MB/s",
            f"{copy.seconds / c.seconds:.2f}",
            _mb(c.peak_rss),
        ]
        for c in contenders
    ]
    title = f"{layers} layers, {_gigabytes(size)} of bf16 to int4 in groups of 128, median of {rounds}"
    show(title, [["", "time", "CPU time", "input", "speed / copy", "peak memory"], *rows])
    medians = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    print("\nour steps: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in medians.items()))


def our_command(work: Path, model: Path) -> Contender:
    recipe = work / "int4.yaml"
    recipe.write_text(json.dumps({"model": str(model), "passes": PASSES, "run": {"memory": "1.4GB"}}))
    return Contender("compress-model", [*COMMAND, str(recipe), "-o", str(work / "out"), "--quiet"])


def timed(command: list[str], model: Path, out: Path) -> Finished:
    """Run ``command`` from files that are not in the page cache to files that are on the disk."""
    os.sync()
    for file in model.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    synced = ["sh", "-c", 'out=$0; "$@" && sync "$out"/*', str(out), *command]
    return run(synced, OMP_NUM_THREADS="2")


def make_checkpoint(path: Path, layers: int) -> Path:
    """``write_checkpoint`` in a process of its own: a small parent keeps the peaks of its children true."""
    run([sys.executable, __file__, "--make", str(path), "--layers", str(layers)])
    return path


def write_checkpoint(path: Path, layers: int) -> None:
    """A Llama with ``layers`` layers and random bf16 weights, in shards, without a tokenizer."""
    from compiler.weights.writer import write

    source = RandomSource(_shapes(layers))
    path.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    write(source.exprs(), {"random": source}, path, shard_bytes=SHARD_BYTES)


class RandomSource:
    """Random weights, made when they are read."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        import torch

        from compiler.ir.types import TensorType

        self.types = {name: TensorType(torch.bfloat16, shape) for name, shape in shapes.items()}

    def exprs(self) -> dict[str, Any]:
        from compiler.weights.expr import load

        return {name: load("random", name, type) for name, type in self.types.items()}

    def read(self, key: str) -> Any:
        return self.read_rows(key, 0, self.types[key].static_shape[0])

    def read_rows(self, key: str, start: int, stop: int) -> Any:
        import torch

        generator = torch.Generator().manual_seed(zlib.crc32(f"{key} {start}".encode()))
        shape = (stop - start, *self.types[key].static_shape[1:])
        return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

    def fingerprint(self) -> str:
        return "random"

    def identity(self) -> str:
        return self.fingerprint()


def _shapes(layers: int) -> dict[str, tuple[int, ...]]:
    return dict(_named_shapes(layers))


def _named_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    matrices = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (GROUPS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (GROUPS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        yield from ((f"model.layers.{layer}.{name}.weight", shape) for name, shape in matrices.items())
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _steps(out: Path) -> list[dict[str, float]]:
    """Seconds of each step, from our report."""
    report = out / "compress" / "timings.json"
    return [json.loads(report.read_text())["seconds"]] if report.exists() else []


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
