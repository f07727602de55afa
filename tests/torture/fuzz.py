"""Inputs that atheris makes, led by which lines of the readers they reach: headers, GGUF files and recipes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from tests.torture.outcomes import SECONDS, Outcome, Tally

MEGABYTES = 4096
LETTERS = {b"a": Outcome("right"), b"r": Outcome("refused")}
"""What the fuzzer notes of every input: accepted, or refused with cause and remedy. It ends at the first defect."""


def write_corpora(folder: Path) -> dict[str, Path]:
    """A small sound file of each kind."""
    files = {"safetensors": folder / "tiny.safetensors", "GGUF": folder / "tiny.gguf", "recipe": folder / "tiny.yaml"}
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, files["safetensors"], metadata={"format": "pt"})
    writer = gguf.GGUFWriter(files["GGUF"], "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("output_norm.weight", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files["recipe"].write_text("model: a/b\npasses:\n  - quantize: {bits: 4, skip: [lm_head]}\nrun: {memory: 4GB}\n")
    return files


def fuzz_inputs(runs: int, seed: int, tally: Tally, work: Path) -> None:
    """``runs`` inputs of each kind, begun from one sound file of it, below ``work``."""
    if find_spec("atheris") is None:
        print("fuzz: not done, atheris is not installed (pip install atheris)", flush=True)
        return
    for kind, file in write_corpora(work).items():
        campaign = f"fuzzed: {kind}"
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
            folder = Path(name)
            (folder / "corpus").mkdir()
            (folder / "corpus" / file.name).write_bytes(file.read_bytes())
            command = [sys.executable, "-m", "tests.torture.fuzzer", kind, folder / "outcomes", folder / "corpus"]
            limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-artifact_prefix={folder}/"]
            options = [f"-runs={runs}", f"-seed={seed + 1}", *limits]
            done = subprocess.run([*command, *options], capture_output=True, text=True, errors="replace", check=False)
            log = folder / "outcomes"
            noted = log.read_bytes() if log.exists() else b""
            for letter, outcome in LETTERS.items():
                for _ in range(noted.count(letter)):
                    tally.add(campaign, kind, outcome)
        if not done.returncode and len(noted) < runs:
            tally.add(campaign, f"seed {seed}", Outcome("traceback", f"{len(noted)} of {runs} inputs were tried"))
        if done.returncode:
            detail = "\n".join(done.stderr.splitlines()[-40:])
            tally.add(campaign, f"seed {seed}", Outcome("traceback", detail))
        tally.show(campaign)
