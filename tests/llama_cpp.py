"""llama.cpp, run in this process by the package xllamacpp, and a tokenizer that it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
PHI = ("</s>", "<unk>", "<s>")  # pieces that llama.cpp looks for in a Phi-3
MERGES = [("t", "h"), ("i", "n"), ("th", "e"), ("Ġ", "a")]
LETTERS = "ĊĠ.,abcdefghijklmnopqrstuvwxyz0123456789"  # tiny models have no token for each byte


def gpt2_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``size`` tokens, the first of which ends texts; some merges."""
    known = [END, *PHI, *LETTERS, *("".join(pair) for pair in MERGES)]
    pieces = [*known, *(letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter not in LETTERS)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces[:size])}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def log_probabilities(file: Path, tokens: list[int], count: int) -> dict[int, float]:
    """What llama.cpp gives the ``count`` likeliest tokens after ``tokens``, float32 caches, one thread."""
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server: Any = xllamacpp.Server(params)
    wanted = {"prompt": tokens, "n_predict": 1, "temperature": 0, "n_probs": count, "cache_prompt": False}
    answer = server.handle_completions(wanted)
    (first, *_) = answer["choices"][0]["logprobs"]["content"]
    return {found["id"]: found["logprob"] for found in first["top_logprobs"]}
