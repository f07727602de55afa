"""Half-quadratic quantisation by the package hqq, run by packages.py in an environment of its own. It takes no data."""

from __future__ import annotations

import sys

import torch
import transformers
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from outside import Job, finish

STORED = 16  # bits of its scales and of its zero points


def main(job: Job) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group, axis=1)
    for layer in model.base_model.layers:
        for linear in [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]:
            made = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
            linear.weight.data = made.dequantize().reshape(linear.weight.shape)
    model.save_pretrained(job.out)
    finish(job, STORED, STORED)


if __name__ == "__main__":
    main(Job.of(sys.argv))
