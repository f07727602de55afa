"""Rounding learned by signed gradients, by the package auto-round, run by packages.py in an environment of its own.

``light`` is the package's own lighter setting, 50 steps a layer; its default is 200.
"""

from __future__ import annotations

import sys

import torch
import transformers
from auto_round import AutoRound
from outside import Job, finish
from torch.utils.data import DataLoader

STEPS = {"light": 50, "default": 200}
STORED = 16  # bits of its scales


def main(job: Job) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    windows = torch.load(job.windows)
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows]
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    quantised, _ = AutoRound(
        model,
        tokenizer,
        bits=job.bits,
        group_size=job.group,
        sym=job.symmetric,
        iters=STEPS[job.method],
        dataset=DataLoader(rows, batch_size=8),
        nsamples=len(rows),
        seqlen=windows.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
    ).quantize()
    linears = {name for name, part in quantised.base_model.layers.named_modules() if isinstance(part, torch.nn.Linear)}
    found = {f"model.layers.{name}.weight": quantised.base_model.layers.get_submodule(name).weight for name in linears}
    model.float().load_state_dict({**plain, **{name: value.detach().float() for name, value in found.items()}})
    model.save_pretrained(job.out)
    finish(job, STORED)


if __name__ == "__main__":
    main(Job.of(sys.argv))
