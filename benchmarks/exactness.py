"""How exact capture and the exact conversion to latent attention are on SmolLM2-135M, in float32."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import ROOT, SMOLLM2, compress, show
from compiler import capture
from compiler.evaluate import kv_cache, load_model, load_tokenizer
from compiler.evaluate.decode import greedy, prompt_ids
from compiler.evaluate.texts import TextData
from compiler.ir.execute import run

PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain why the sky is blue.",
    "Tell me a story about a fox and a crow.",
]
NEW_TOKENS = 64


def main() -> None:
    tokenizer = load_tokenizer(SMOLLM2)
    windows = TextData(ROOT / "benchmarks/data/persuasion.txt", samples=4, length=256).windows(tokenizer)
    original = load_model(SMOLLM2)
    with torch.inference_mode():
        expected = original(windows).logits
    (captured,) = run(capture(SMOLLM2), {"input_ids": windows}).values()
    directory, _ = compress("smollm2-mla", SMOLLM2, ["gqa-to-mla"])
    converted = load_model(directory)
    with torch.inference_mode():
        latent = converted(windows).logits
    same = 0
    for prompt in PROMPTS:
        ids = prompt_ids(tokenizer, prompt, chat=True)
        texts = [list(greedy(model, ids, NEW_TOKENS, stop=False)) for model in (original, converted)]
        same += texts[0] == texts[1]
    before, after = kv_cache(SMOLLM2), kv_cache(directory)
    show(
        f"SmolLM2-135M-Instruct, float32, {windows.numel()} tokens of text",
        [
            ("what", "measured"),
            ("captured graph, largest logit difference from transformers", distance(captured, expected)),
            (f"{type(converted).__name__}, the same", distance(latent, expected)),
            (f"the same {NEW_TOKENS} tokens in greedy decoding", f"{same} of {len(PROMPTS)} prompts"),
            ("live cache, values per token", f"{before.values_per_token:g} before, {after.values_per_token:g} after"),
            ("live cache, bytes per token", f"{before.bytes_per_token:g} before, {after.bytes_per_token:g} after"),
        ],
    )


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """The largest difference, and its share of the largest logit."""
    worst, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    return f"{worst:.3g} ({worst / scale:.2g} of their scale {scale:.3g})"


if __name__ == "__main__":
    main()
