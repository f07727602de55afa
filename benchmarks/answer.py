"""Let a checkpoint answer a prompt with nothing but transformers: ``python benchmarks/answer.py DIRECTORY PROMPT``."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main(directory: str, prompt: str) -> None:
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"{type(model).__module__}.{type(model).__name__}, loaded by plain transformers from {directory}")
    print(f"> {prompt}\n{tokenizer.decode(ids, skip_special_tokens=True)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
