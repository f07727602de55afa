"""AutoRound by the package auto-round, run by packages.py in an environment of its own.

``light`` is its preset of 50 steps a layer, of 200 in the default.
"""

from __future__ import annotations

import sys

import torch
import transformers
from auto_round import AutoRound
from outside import Job, finish
from torch.utils.data import DataLoader

STORED = 16  # bits of its scales
STEPS = {"light": 50, "default": 200}
BATCH = 4


def main(job: Job) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    windows = torch.load(job.windows)
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows]
    rounding = AutoRound(
        model,
        tokenizer,
        bits=job.bits,
        group_size=job.group,
        sym=job.symmetric,
        iters=STEPS[job.method],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=BATCH,
        dataset=DataLoader(rows, batch_size=BATCH),
        device_map="cpu",
        enable_torch_compile=False,
    )
    made, _ = rounding.quantize()
    made.save_pretrained(job.out)
    finish(job, STORED)


if __name__ == "__main__":
    main(Job.of(sys.argv))
