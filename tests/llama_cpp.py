"""llama.cpp, run in this process by the package xllamacpp, and a tokenizer that it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
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


def word_pieces() -> PreTrainedTokenizerFast:
    """Uncased word pieces: every letter, alone and as what continues a word, and some longer ones."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz.,'"
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), "the", "inn", "##ing"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    around = [(name, special.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=around)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)


def embedding(file: Path, text: str) -> torch.Tensor:
    """What llama.cpp makes of ``text``, pooled as the file says, not normalised, one thread: float32 [width]."""
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_parallel, params.warmup, params.embedding = 1, False, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server: Any = xllamacpp.Server(params)
    answer = server.handle_embeddings({"input": text, "embd_normalize": -1})
    return torch.tensor(answer["data"][0]["embedding"])
