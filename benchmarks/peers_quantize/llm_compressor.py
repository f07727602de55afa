"""GPTQ of llm-compressor with its defaults, run by packages.py in an environment of its own."""

from __future__ import annotations

import sys

import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from outside import FLOAT, Job, finish


def main(job: Job) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    windows = torch.load(job.windows)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows.tolist()]
    weights = QuantizationArgs(
        num_bits=job.bits, type="int", symmetric=job.symmetric, strategy="group", group_size=job.group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(rows),
        max_seq_length=windows.shape[1],
    )
    model.save_pretrained(job.out, save_compressed=True)
    finish(job, FLOAT)


if __name__ == "__main__":
    main(Job.of(sys.argv))
